"""The rough scan in int8: what it finds, at every cut, and that its integers never overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search import policy
from memorizing_transformers.memory.search.bucketed import BucketedSearch
from memorizing_transformers.memory.search.kernels import int8_scan as quantized
from memorizing_transformers.memory.search.kernels.int8_scan import (
    LARGEST_SCORE,
    NONE,
    best_places,
    quantized_keys,
    quantized_queries,
    quantized_search,
)
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.memory.search.reference import reference_search


def search(queries: Tensor, memory: Memory, top_k: int, score_bytes: int = 2**25) -> Neighbours:
    return quantized_search(queries, memory, top_k, score_bytes)


def filled(size: int, written: list[int], width: int = 16) -> Memory:
    """A memory whose unused slots hold NaN and whose keys all lean the same way."""
    memory = Memory(len(written), 2, size, width)
    memory.keys.fill_(torch.nan)
    longest = max(written)
    keys = torch.randn(len(written), 2, longest, width) + 30.0
    memory.write(keys, keys, torch.arange(longest) < torch.tensor(written)[:, None])
    return memory


@pytest.mark.parametrize(
    ("written", "top_k", "buckets", "block", "score_bytes"),
    [
        ([1009, 333], 32, 16384, 4096, 2**25),
        ([1009, 333], 32, 200, 256, 2**25),
        ([3000, 1008], 7, 100, 64, 2**15),
        ([700, 40], 64, 150, 128, 2**14),
        ([3, 0], 8, 16384, 4096, 2**25),
        ([1, 1009], 1, 130, 64, 1),
    ],
    ids=str,
)
def test_finds_nearly_all_best_first_and_nothing_unwritten(
    written: list[int],
    top_k: int,
    buckets: int,
    block: int,
    score_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "MOST_BUCKETS", buckets)
    monkeypatch.setattr(quantized, "BLOCK", block)
    monkeypatch.setattr(quantized, "NARROW", 128)
    memory = filled(1009, written)
    queries = torch.randn(2, 2, 41, 16)
    found = quantized_search(queries, memory, top_k, score_bytes)
    expected = reference_search(queries, memory, top_k)
    assert torch.equal(found.valid, expected.valid)
    slots = found.slots.masked_fill(~found.valid, 0)
    assert (slots < memory.fill[:, None, None, None])[found.valid].all()
    distinct = torch.where(found.valid, slots, -1 - torch.arange(top_k)).sort(-1).values
    assert (distinct.diff(dim=-1) > 0).all()
    scores = (queries @ memory.keys.mT).gather(-1, slots).masked_fill(~found.valid, -torch.inf)
    torch.testing.assert_close(scores, scores.sort(-1, descending=True).values)
    hit = (slots[..., None, :] == expected.slots[..., None]) & found.valid[..., None, :]
    assert hit.any(-1)[expected.valid].float().mean() > 0.98


@pytest.mark.parametrize("width", [1, 3, 130, 600, 5000])
@pytest.mark.parametrize("count", [1, 40, 300])
def test_best_places_equal_topk(width: int, count: int) -> None:
    count = min(count, width)
    scores = torch.randint(NONE + 1, LARGEST_SCORE + 1, (5, width), dtype=torch.int32)
    found = scores.gather(1, best_places(scores, count)).sort(1, descending=True).values
    assert torch.equal(found, scores.topk(count, dim=1).values)


@pytest.mark.parametrize("width", [8, 260, 261, 1000])
def test_scores_stay_in_bounds(width: int) -> None:
    """At any width, and with keys and queries that use every level of every entry."""
    keys = torch.ones(4, width) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    scores = quantized_queries(keys).long() @ quantized_keys(keys).long().T
    assert scores.abs().max() <= LARGEST_SCORE < -NONE
    assert scores.abs().max() > 0.8 * LARGEST_SCORE * min(1.0, width / 261)


@pytest.mark.parametrize("members", [1, 8])
def test_keys_that_are_all_alike_or_score_below_zero_are_found(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "MOST_BUCKETS", 1024 // members)
    memory = Memory(1, 1, 1000, 8)
    keys = torch.ones(1, 1, 1000, 8)
    memory.write(keys, keys)
    queries = -torch.ones(1, 1, 5, 8)
    slots, valid = quantized_search(queries, memory, 4, 2**25)
    assert valid.all()
    assert (slots < 1000).all()
    assert (slots.sort(-1).values.diff(dim=-1) > 0).all()
    memory.write(0.5 * keys[:, :, :3], keys[:, :, :3])
    assert (search(queries, memory, 3).slots.sort(-1).values == torch.arange(3)).all()


def test_one_outlier_does_not_blur_the_others() -> None:
    memory = Memory(1, 1, 5000, 16)
    keys = torch.randn(1, 1, 5000, 16)
    keys[0, 0, 7] *= 1000
    memory.write(keys, keys)
    queries = torch.randn(1, 1, 64, 16)
    assert measured_recall(search, queries, memory, 32) > 0.98


def test_bucketed_search_uses_it_where_it_pays_and_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def noted(*arguments: Any) -> Neighbours:
        calls.append(arguments)
        return quantized_search(*arguments)

    monkeypatch.setattr(policy, "has_fast_int8", lambda: True)
    monkeypatch.setattr(policy, "quantized_search", noted)
    monkeypatch.setattr(policy, "QUANTIZED_SLOTS", 500)
    large, small = filled(1000, [600]), filled(1000, [400])
    many, few = torch.randn(1, 2, 128, 16), torch.randn(1, 2, 20, 16)
    BucketedSearch(0.95)(many, large, 8)
    assert len(calls) == 1
    for target, queries, memory in ((0.99, many, large), (0.95, few, large), (0.95, many, small)):
        BucketedSearch(target)(queries, memory, 8)
    assert len(calls) == 1


def test_dropped_pairs_are_not_found() -> None:
    memory = filled(400, [900, 300])
    memory.drop(torch.tensor([150, 100]))
    queries = torch.randn(2, 2, 30, 16)
    found, expected = search(queries, memory, 16), reference_search(queries, memory, 16)
    hit = (found.slots[..., None, :] == expected.slots[..., None]).any(-1)
    assert memory.valid()[:, None, None].expand(-1, 2, 30, -1).gather(-1, found.slots).all()
    assert hit.float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dropped", [0, 150], ids=["", "dropped"])
def test_reads_keys_as_they_are_stored_and_none_that_were_dropped(
    dtype: torch.dtype, dropped: int
) -> None:
    memory = Memory(1, 2, 500, 16, dtype)
    # Dropped keys are the best by far; stored in int8, every key has another scale.
    keys = torch.randn(1, 2, 700, 16) * torch.logspace(-1, 1, 700).flip(0)[:, None]
    memory.write(keys, keys)
    memory.drop(memory.written - 500 + dropped)
    queries = torch.randn(1, 2, 64, 16)
    found, expected = search(queries, memory, 8), reference_search(queries, memory, 8)
    hit = (found.slots[..., None, :] == expected.slots[..., None]).any(-1)
    assert hit.float().mean() > 0.9
