"""The scan on a CPU and its top-k, where blocks, spans and buckets do not come out even."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers.memory import Memory
from memorizing_transformers.memory.search import bucketed, policy
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.memory.search.kernels import cpu_scan as host
from memorizing_transformers.memory.search.kernels import top_k as largest
from memorizing_transformers.memory.search.kernels.cpu_scan import HostScan
from memorizing_transformers.memory.search.kernels.torch_buckets import torch_buckets
from memorizing_transformers.memory.search.reference import reference_search


def filled(size: int, written: list[int], width: int = 8, heads: int = 2) -> Memory:
    """A memory whose unused slots hold NaN."""
    memory = Memory(len(written), heads, size, width)
    memory.keys.fill_(torch.nan)
    for first in range(0, max(written), 100):
        count = (torch.tensor(written) - first).clamp(0, 100)
        pairs = torch.randn(2, len(written), heads, 100, width)
        memory.write(*pairs, torch.arange(100) < count[:, None])
    return memory


def true_scores(queries: torch.Tensor, memory: Memory, slots: torch.Tensor) -> torch.Tensor:
    return (queries @ memory.keys.mT).gather(-1, slots)


@pytest.mark.parametrize("block_scores", [2**19, 5000, 700])
@pytest.mark.parametrize("score_bytes", [2**25, 2**17, 5000])
@pytest.mark.parametrize("written", [[1009, 333], [1, 0], [2500, 1008]], ids=str)
@pytest.mark.parametrize("top_k", [1, 7, 32, 300])
def test_exact_at_every_cut(
    top_k: int,
    written: list[int],
    score_bytes: int,
    block_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "BLOCK_SCORES", block_scores)
    monkeypatch.setattr(host, "AT_ONCE", 0)
    memory = filled(1009, written)
    queries = torch.randn(len(written), 2, 63, 8)
    found = ExactSearch(score_bytes)(queries, memory, top_k)
    expected = reference_search(queries, memory, top_k)
    assert torch.equal(found.valid, expected.valid)
    for row, fill in enumerate(memory.fill.tolist()):
        kept = min(top_k, fill)
        ours, theirs = (x.slots[row, ..., :kept] for x in (found, expected))
        torch.testing.assert_close(
            true_scores(queries, memory, ours.new_zeros(found.slots.shape).copy_(found.slots))[
                row, ..., :kept
            ],
            true_scores(queries, memory, expected.slots)[row, ..., :kept],
        )
        assert (ours.sort(-1).values.diff(dim=-1) > 0).all()
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("block_scores", [2**19, 5000])
def test_each_bucket_gives_its_best_member(
    block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All buckets asked for: what returns is the best of each, and every slot lies in one."""
    monkeypatch.setattr(host, "BLOCK_SCORES", block_scores)
    memory = filled(1000, [1000], heads=1)
    queries = torch.randn(1, 1, 40, 8)
    found = HostScan(100, torch.float32)(queries, memory, 50)
    best = reference_search(queries, memory, 1)
    assert torch.equal(found.slots[..., :1], best.slots)
    assert (found.slots.sort(-1).values.diff(dim=-1) > 0).all()
    scores = true_scores(queries, memory, found.slots)
    assert torch.equal(scores, scores.sort(-1, descending=True).values)


@pytest.mark.parametrize("host_path", [True, False], ids=["host", "device"])
def test_keys_that_recur_with_the_segments_do_not_collide(
    host_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All true neighbours lie whole segments of 128 apart, as keys without context do."""
    monkeypatch.setattr(policy, "ROUGH_SLOTS", 0)
    monkeypatch.setattr(policy, "has_fast_bfloat16", lambda: False)
    slots, top_k, target = 8 * 768, 36, 0.95
    places = torch.nn.functional.normalize(torch.randn(128, 16), dim=-1)
    keys = places.repeat(slots // 128, 1) + 0.05 * torch.randn(slots, 16)
    memory = Memory(1, 1, slots, 16)
    memory.write(keys[None, None], keys[None, None])
    search, queries = bucketed.BucketedSearch(target), places[None, None]
    if host_path:
        found = search(queries, memory, top_k)
    else:
        found = torch_buckets(queries, memory, top_k, host.odd_stride(768), 2**26)
    expected = reference_search(queries, memory, top_k)
    hit = (found.slots[..., None, :] == expected.slots[..., None]).any(-1)
    assert hit.float().mean() >= target


@pytest.mark.parametrize("threads", [1, 99], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 31, 256, 257, 600, 5003])
@pytest.mark.parametrize("top_k", [1, 5, 32, 100, 400])
def test_largest_equals_topk(
    top_k: int, width: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest.torch, "get_num_threads", lambda: threads)
    top_k = min(top_k, width)
    scores = torch.randn(2, 3, width).to(dtype)
    values, indices = largest.largest(scores, top_k)
    assert torch.equal(values, scores.topk(top_k).values)
    assert torch.equal(values, scores.gather(-1, indices))
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()


def test_largest_survives_infinities_and_negative_zero() -> None:
    scores = torch.full((1, 700), -torch.inf)
    scores[0, [3, 500, 699]] = torch.tensor([torch.inf, -0.0, -1e38])
    values, indices = largest.largest(scores, 5)
    assert indices[0, :3].tolist() == [3, 500, 699]
    assert values[0, 3:].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "bf16"])
def test_bucketed_scans_a_large_memory(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different length, candidates in bfloat16 or fp32, best first by fp32."""
    monkeypatch.setattr(policy, "ROUGH_SLOTS", 0)
    monkeypatch.setattr(policy, "has_fast_bfloat16", lambda: fast)
    memory = filled(9001, [12000, 700])
    queries = torch.randn(2, 2, 63, 8)
    found = bucketed.BucketedSearch(0.9)(queries, memory, 16)
    expected = reference_search(queries, memory, 16)
    assert torch.equal(found.valid, expected.valid)
    hit = (found.slots[..., None, :] == expected.slots[..., None]).any(-1)
    assert hit.float().mean() >= 0.9
    scores = true_scores(queries, memory, found.slots)
    torch.testing.assert_close(scores, scores.sort(-1, descending=True).values)


@pytest.mark.parametrize("way", ["bf16", "int8"])
def test_ranks_that_rough_scores_confuse_are_set_right(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rivals score alike when scored roughly; consecutive, no two share a bucket."""
    monkeypatch.setattr(policy, "ROUGH_SLOTS", 0)
    monkeypatch.setattr(policy, "QUANTIZED_SLOTS", 0)
    monkeypatch.setattr(policy, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(policy, "has_fast_int8", lambda: way == "int8")
    heads, top_k, rivals = 6, 8, 2
    keys = 0.05 * torch.randn(1, heads, 5000, 8)
    for head in range(heads):
        order = torch.randperm(top_k + rivals)
        keys[0, head, 1000 : 1000 + len(order)] = 0.0
        keys[0, head, 1000 : 1000 + len(order), 0] = 1 + 1e-5 * order
    memory = Memory(1, heads, 5000, 8)
    memory.write(keys, keys)
    queries = torch.eye(1, 8).expand(1, heads, 128, 8)
    found = bucketed.BucketedSearch(0.95)(queries, memory, top_k)
    assert torch.equal(found.slots, reference_search(queries, memory, top_k).slots)
