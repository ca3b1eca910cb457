"""A scan for few queries gives what the reference gives, wherever the ring begins and ends."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers.memory import Memory, make_search
from memorizing_transformers.memory.search.reference import reference_search


@pytest.mark.parametrize("storage", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("dropped", [0, 1, 7, 30])
@pytest.mark.parametrize("written", [20, 64, 100])
def test_dropped_pairs_are_never_given(written: int, dropped: int, storage: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(written)
    memory = Memory(2, 3, 64, 8, storage)
    for count in (written // 2, written - written // 2):
        pairs = torch.randn(2, 2, 3, count, 8, generator=draw)
        memory.write(pairs[0], pairs[1])
    # The oldest ones are the best for every query, so that a search that forgets to leave them out
    # gives them.
    queries = torch.randn(2, 3, 2, 8, generator=draw)
    age = memory.age()
    oldest = (age >= memory.fill[:, None] - max(dropped, 1)) & memory.valid()
    oldest[1] = False  # else its best ones are equal, and either would do
    best = 50 * queries.mean(2, keepdim=True).expand(-1, -1, 64, -1)
    if storage == torch.float32:
        memory.keys = torch.where(oldest[:, None, :, None], best, memory.keys)
    memory.drop(torch.tensor([dropped, 0]))
    wanted = reference_search(queries, memory, 5)
    for name in ("exact", "bucketed"):
        found = make_search(name)(queries, memory, 5)
        assert torch.equal(found.valid, wanted.valid)
        for row in range(2):
            left = set(memory.valid()[row].nonzero().flatten().tolist())
            kept = found.slots[row][found.valid[row]].tolist()
            assert set(kept) <= left
        one, other = (x.slots.masked_fill(~x.valid, -1).sort(-1).values for x in (found, wanted))
        assert torch.equal(one, other)
