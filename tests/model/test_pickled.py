"""A model that has searched can be saved whole, and its copy finds the same."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from build import random_tokens, read, small_model

from memorizing_transformers.memory import SEARCHES, MemoryBank
from memorizing_transformers.memory.search import cells
from memorizing_transformers.model import Transformer

SEGMENT, SIZE = 500, 4096


def saved_whole(model: Transformer) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def found_by(model: Transformer, bank: MemoryBank) -> list[torch.Tensor]:
    """What a segment is told from, and its losses."""
    ids = random_tokens(2, SEGMENT, 2)
    with torch.no_grad():
        output = model.score(ids, bank, ids)
    assert output.nll is not None
    found = [x for one in output.retrievals.values() for x in (one.slots, one.valid)]
    return [*found, output.nll]


def copies(model: Transformer) -> list[Any]:
    """Of all kinds, and a new model with the same weights."""
    new = Transformer(model.config)
    new.load_state_dict(model.state_dict())
    return [new, pickle.loads(pickle.dumps(model)), saved_whole(model), copy.deepcopy(model)]


@pytest.mark.parametrize("settings", [{"copy": ["repeats"]}, *({"search": x} for x in SEARCHES)])
def test_a_model_that_has_searched_can_be_saved_whole(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = settings.get("search", "exact")
    if search.startswith("faiss"):
        pytest.importorskip("faiss")
    for name in ("LEAST_SLOTS", "LEAST_QUERIES", "LEAST_SCORES", "KEYS_FIND"):
        monkeypatch.setattr(cells, name, 0)
    model = small_model(size=SIZE, **settings)
    bank = model.new_memory(2)
    with torch.no_grad():
        read(model, bank, random_tokens(2, 6 * SEGMENT), SEGMENT)
    before = found_by(model, bank)
    found = [found_by(one, bank) for one in copies(model)]
    if search not in ("faiss", "faiss-ivf", "faiss-hnsw"):
        # What those find depends on when an index was made.
        found.append(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))
