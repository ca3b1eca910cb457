"""How much memory a search takes beside what it is given and what it returns."""

from __future__ import annotations

import pytest
import torch
from peak import Peak

from memorizing_transformers.memory import Memory, Search
from memorizing_transformers.memory.search import auto, policy
from memorizing_transformers.model import ModelConfig, Transformer

ROWS, HEADS, QUERIES, SLOTS, WIDTH, TOP_K = 2, 2, 256, 32768, 16, 8


def peak(search: Search, dtype: torch.dtype) -> int:
    memory = Memory(ROWS, HEADS, SLOTS, WIDTH, dtype)
    memory.write(*torch.randn(2, ROWS, HEADS, SLOTS, WIDTH))
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH)
    with Peak() as measured:
        search(queries, memory, TOP_K)
    return measured.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(
    "name", ["exact", "bucketed, int8", "bucketed, bf16", "auto, exact", "auto, bucketed"]
)
def test_scores_stay_within_the_bound_of_the_configuration(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model builds its search: what runs in the end is measured, whatever wraps it."""
    monkeypatch.setattr(policy, "has_fast_int8", lambda: "int8" in name)
    monkeypatch.setattr(policy, "has_fast_bfloat16", lambda: True)
    monkeypatch.setitem(auto.EXACT_UP_TO, "cpu", SLOTS if "exact" in name else SLOTS - 1)
    outcome = ROWS * HEADS * QUERIES * TOP_K * 16
    keys_of_a_head = SLOTS * WIDTH * (4 if dtype == torch.int8 else 2)
    whole = ROWS * HEADS * QUERIES * SLOTS * 4
    for bound in (2**20, 2**22):
        settings = {"search": name.split(",")[0], "search_bytes": bound}
        model = Transformer(ModelConfig(vocab_size=5, num_layers=1, memory=settings))  # type: ignore[arg-type]
        most = peak(model.layers[0].attention.reader.search, dtype)
        assert most < 1.5 * bound + 1.5 * keys_of_a_head + 2 * outcome < whole / 4
