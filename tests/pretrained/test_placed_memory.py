"""A memory that skips the first pairs of segments, and a cache that keeps a document's first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import MemoryBank, PlacedMemory, SegmentPairs
from memorizing_transformers.pretrained.sink_cache import SinkCache

B, G, D = 2, 2, 4


def segment(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs whose numbers are the positions of their tokens."""
    place = torch.arange(start, start + count, dtype=torch.float32)
    keys = place[None, None, :, None].expand(B, G, -1, D).clone()
    return keys, -keys


@pytest.mark.parametrize("skip_first", [0, 1, 3])
@pytest.mark.parametrize("size", [5, 16, 64])
def test_positions_are_those_of_the_tokens_past_capacity_too(size: int, skip_first: int) -> None:
    memory = PlacedMemory(B, G, size, D, skip_first=skip_first)
    lengths, stored, start = [6, 4, 7, 2, 9, 1], [], 0
    for length in lengths:
        memory.write(*segment(start, length))
        stored += range(start + min(skip_first, length), start + length)
        start += length
        valid = memory.valid()
        for row in range(B):
            held = memory.positions[row, valid[row]]
            assert sorted(held.tolist()) == stored[-size:]
            assert torch.equal(memory.keys[row, 0, valid[row], 0].long(), held)
            assert torch.equal(memory.values[row, 1, valid[row], 0].long(), -held)
        assert memory.read.tolist() == [start] * B


def test_padding_counts_as_no_token_and_rows_are_cleared_alone() -> None:
    memory = PlacedMemory(B, G, 16, D)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    memory.write(*segment(0, 6), mask=mask)
    assert memory.read.tolist() == [6, 2]
    assert memory.fill.tolist() == [5, 1]
    memory.reset(torch.tensor([True, False]))
    memory.write(*segment(0, 3))
    assert memory.read.tolist() == [3, 5]
    assert sorted(memory.positions[0, memory.valid()[0]].tolist()) == [1, 2]
    assert sorted(memory.positions[1, memory.valid()[1]].tolist()) == [1, 3, 4]


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_full_cache_keeps_the_first_pairs_of_the_document(sinks: int) -> None:
    cache, start = SinkCache(B, G, 8, D, sinks=sinks), 0
    for length in [2, 5, 3, 1, 9, 4]:
        cache.write(*segment(start, length))
        start += length
        expected = list(range(max(0, start - 8), start))
        if start > 8:
            expected[:sinks] = range(sinks)
        held = cache.keys[0, 0, cache.valid()[0], 0].long().tolist()
        assert held == expected
        assert torch.equal(cache.values, -cache.keys)
    cache.reset(torch.tensor([True, False]))
    cache.write(*segment(100, 3))
    assert cache.keys[0, 0, cache.valid()[0], 0].tolist() == [100, 101, 102]
    cache.write(*segment(103, 9))
    first = cache.keys[:, 0, cache.valid()[0], 0][:, :sinks]
    assert first[0].tolist() == [100, 101, 102][:sinks]
    assert first[1].tolist() == list(range(sinks))


def test_a_bank_of_them_is_saved_and_loaded() -> None:
    def bank() -> MemoryBank:
        memories = {1: PlacedMemory(B, G, 8, D)}
        return MemoryBank(B, memories, {1: SinkCache(B, G, 4, D)})

    def commit(target: MemoryBank, start: int) -> None:
        pairs = {1: segment(start, 5)}
        target.commit(SegmentPairs(pairs, pairs))

    one, other = bank(), bank()
    for start in (0, 5, 10):
        commit(one, start)
    other.load({name: tensor.clone() for name, tensor in one.tensors().items()})
    for start in (15, 20):
        commit(one, start)
        commit(other, start)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("size", [2, 5, 8, 12])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_cache_of_another_size_keeps_the_first_pairs_too(size: int, sinks: int) -> None:
    one, other = (SinkCache(B, G, n, D, sinks=sinks) for n in (8, size))
    for start in range(0, 20, 5):
        one.write(*segment(start, 5))
    other.load(one.tensors())
    kept, newest = min(sinks, size), min(8, size)
    held = other.keys[0, 0, other.valid()[0], 0].long().tolist()
    expected = [*range(20 - newest, 20)]
    expected[:kept] = range(kept)
    assert held == expected
    assert torch.equal(other.values, -other.keys)
    other.write(*segment(20, 9))
    expected = [*range(29 - size, 29)]
    expected[:kept] = range(kept)
    if size <= 9:
        assert other.keys[0, 0, other.valid()[0], 0].long().tolist() == expected
