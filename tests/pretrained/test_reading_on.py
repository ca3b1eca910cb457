"""A pretrained model reads token by token as it reads segment by segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny
from torch import Tensor

from memorizing_transformers import MemorizedModel, memorize
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.session import Session
from memorizing_transformers.training.checkpoint import opening

N, LENGTH = 6, 44
SETTINGS: dict[str, dict[str, Any]] = {
    "memory": {"layers": [1]},
    "xl": {"layers": [1], "xl_cache": 8},
    "start": {"layers": [0, 1], "xl_cache": 4, "position": "start", "skip_first": 0},
    "cache-alone": {"layers": [], "xl_cache": 8},
    "nothing": {"layers": []},
}


@torch.no_grad()
def by_segment(model: MemorizedModel, ids: Tensor) -> Tensor:
    bank, logits = model.new_memory(len(ids)), []
    for part in ids.split(N, 1):
        # The last segment is not whole: what is far is then a little nearer.
        whole = torch.nn.functional.pad(part, (0, N - part.shape[1]))
        output = model(whole, bank)
        logits.append(output.logits[:, : part.shape[1]])
        bank.commit(output.pairs, token_ids=whole)
    return torch.cat(logits, 1)


def compare(model: MemorizedModel, sizes: list[int]) -> None:
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    expected = by_segment(model.eval(), ids)
    session, logits, start = Session(model, 2, N), [], 0
    while start < LENGTH:
        size = sizes[len(logits) % len(sizes)]
        part = ids[:, start : start + size]
        logits.append(torch.cat([output.logits for _, output in session.parts(part)], 1))
        start += size
    assert torch.allclose(torch.cat(logits, 1), expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("sizes", [[1], [5, 1, 13]], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_in_whatever_parts_a_text_comes_its_logits_are_the_same(
    name: str, sizes: list[int]
) -> None:
    settings = dict(SETTINGS[name])
    compare(memorize(tiny("llama"), {"size": 20, "top_k": 4}, **settings), sizes)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_every_family_reads_token_by_token(family: str) -> None:
    model = memorize(tiny(family), {"size": 20, "top_k": 4}, layers=[1], xl_cache=8)
    compare(model, [1])


@pytest.mark.parametrize("window", [3 * N, N])
def test_the_trained_window_holds_for_a_part_as_for_its_segment(window: int) -> None:
    base = tiny("llama", max_position_embeddings=window)
    compare(memorize(base, {"size": 40, "top_k": 4}, layers=[1]), [1])


def test_taken_rows_go_on_as_if_alone() -> None:
    model = memorize(tiny("llama"), {"size": 20, "top_k": 4}, layers=[1], xl_cache=8).eval()
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    expected = by_segment(model, ids)
    for read in (10, 4 * N):
        session = Session(model, 2, N)
        session.read(ids[:, :read])
        taken = session.take([1, 1, 0]).take([0, 2, 1])
        for place in range(read, LENGTH):
            token = ids[[1, 0, 1], place : place + 1]
            found = taken.read(token)
            assert torch.allclose(found, expected[[1, 0, 1], place], atol=3e-4, rtol=1e-3)
            found = session.read(ids[:, place : place + 1])
            assert torch.allclose(found, expected[:, place], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(("asked", "held"), [(0, 0), (40, 40), (None, 65536)])
def test_the_size_that_is_asked_for_is_the_size_of_the_memory(
    asked: int | None, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(opening, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(opening, "induction_layers", lambda *_, **__: [1])
    model, segment = opening.open_for_use(str(tmp_path), 16, asked)
    bank = model.new_memory(1)
    assert segment == 16
    assert {memory.size for memory in bank.memories.values()} == ({held} if held else set())


@pytest.mark.parametrize("length", [0, -1])
def test_a_segment_without_a_token_is_refused(length: int, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"segment_length = {length}: must be at least 1"):
        opening.open_for_use(str(tmp_path), length, None)
