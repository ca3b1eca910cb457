"""The Triton kernel under Triton's interpreter, and as itself where there is a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, MemoryView, Neighbours
from memorizing_transformers.memory.search import bucketed, policy
from memorizing_transformers.memory.search.bucketed import BucketedSearch
from memorizing_transformers.memory.search.policy import Kernel, KernelChoice, KernelFailed
from memorizing_transformers.memory.search.reference import reference_search

pytest.importorskip("triton", reason="triton is not installed")
MODULE = "memorizing_transformers.memory.search.kernels.triton_buckets"


@pytest.fixture(
    scope="module",
    params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def fused(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The kernel's module; triton decides when a kernel is defined how it will run."""
    if request.param == "cuda" and not policy.has_fused_kernel():
        pytest.skip("needs a GPU that runs Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if request.param == "interpreter" else "0")
        sys.modules.pop(MODULE, None)
        module = importlib.import_module(MODULE)
        module.DEVICE = "cpu" if request.param == "interpreter" else "cuda"
        yield module
    sys.modules.pop(MODULE, None)


def filled(
    size: int, written: list[int], groups: int, width: int, dtype: torch.dtype, device: str
) -> Memory:
    """A memory whose unused slots hold NaN."""
    memory = Memory(len(written), groups, size, width, dtype, device)
    for tensor in (memory.keys, memory.key_scales):
        if tensor is not None and tensor.is_floating_point():
            tensor.fill_(torch.nan)
    longest = max(*written, 1)
    # Numbers that bfloat16 knows: the interpreter does not round.
    pairs = torch.randn(2, len(written), groups, longest, width, device=device).bfloat16().float()
    memory.write(
        *pairs, torch.arange(longest, device=device) < torch.tensor(written, device=device)[:, None]
    )
    return memory


def expected_maxima(queries: Tensor, memory: Memory, num_buckets: int) -> Tensor:
    """(B, G, Q, L) the largest score of each bucket."""
    scores = queries.float() @ memory.keys_at(...).nan_to_num().mT
    scores = scores.masked_fill(~memory.valid()[:, None, None], -torch.inf)
    turns = -(-memory.size // num_buckets)
    padding = scores.new_full((*scores.shape[:3], turns * num_buckets - memory.size), -torch.inf)
    return torch.cat([scores, padding], -1).unflatten(-1, (turns, num_buckets)).amax(-2)


SHAPES = [
    # slots, pairs written to each row, heads, queries, width, buckets
    pytest.param(128, [128, 128], 2, 16, 16, 64, id="everything even"),
    pytest.param(1009, [3000, 700], 2, 37, 24, 65, id="primes, wrapped and not full"),
    pytest.param(300, [300, 0, 1], 1, 1, 64, 101, id="one query, rows of one pair and none"),
    pytest.param(50, [20, 50], 2, 5, 128, 607, id="more buckets than slots"),
    pytest.param(64, [64], 3, 130, 20, 1, id="one bucket, two blocks of queries"),
    pytest.param(40, [0, 0], 1, 3, 16, 7, id="nothing stored"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("size", "written", "groups", "count", "width", "num_buckets"), SHAPES)
def test_finds_the_best_slot_of_each_bucket(
    fused: ModuleType,
    size: int,
    written: list[int],
    groups: int,
    count: int,
    width: int,
    num_buckets: int,
    dtype: torch.dtype,
) -> None:
    memory = filled(size, written, groups, width, dtype, fused.DEVICE)
    queries = torch.randn(len(written), groups, count, width, device=fused.DEVICE).bfloat16()
    best, slots = fused.bucket_maxima(queries, memory, num_buckets)
    expected = expected_maxima(queries, memory, num_buckets)
    # Tensor cores add in another order, and scale int8 after the sum.
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(best, expected, **near)
    there = best > -torch.inf
    assert torch.equal(
        slots % num_buckets, torch.arange(num_buckets, device=slots.device).expand_as(slots)
    )
    # The slot is where the score comes from.
    scores = queries.float() @ memory.keys_at(...).nan_to_num().mT
    torch.testing.assert_close(
        scores.gather(-1, slots.masked_fill(~there, 0))[there], best[there], **near
    )


def test_of_equal_scores_one_is_taken(fused: ModuleType) -> None:
    memory = Memory(1, 1, 96, 16, device=fused.DEVICE)
    keys = torch.ones(1, 1, 96, 16, device=fused.DEVICE)
    memory.write(keys, keys)
    best, slots = fused.bucket_maxima(keys[:, :, :3], memory, 32)
    assert (best == 16).all()
    assert torch.equal(slots, torch.arange(32, device=slots.device).expand(1, 1, 3, 32))


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3)], ids=str)
def test_some_rows_are_as_in_all(fused: ModuleType, rows: slice) -> None:
    memory = filled(70, [70, 30, 50], 2, 16, torch.int8, fused.DEVICE)
    queries = torch.randn(3, 2, 5, 16, device=fused.DEVICE)
    for part, whole in zip(
        fused.bucket_maxima(queries, memory, 33, rows),
        fused.bucket_maxima(queries, memory, 33),
        strict=True,
    ):
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_row_of_a_view_is_as_its_owner(
    fused: ModuleType, dtype: torch.dtype, rows: slice
) -> None:
    memory = filled(70, [70, 30, 50], 2, 16, dtype, fused.DEVICE)
    owners = [2, 0, 2, 1]
    queries = torch.randn(4, 2, 5, 16, device=fused.DEVICE)
    seen = fused.bucket_maxima(queries, MemoryView(memory, owners), 33, rows)
    for place, row in enumerate(range(4)[rows]):
        asked = torch.zeros(3, 2, 5, 16, device=fused.DEVICE)
        asked[owners[row]] = queries[row]
        own = fused.bucket_maxima(asked, memory, 33)
        for ours, theirs in zip(seen, own, strict=True):
            assert torch.equal(ours[place], theirs[owners[row]])


def test_what_counts_is_asked_once_for_all_groups_of_rows(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = filled(70, [70, 30, 50], 2, 16, torch.float32, fused.DEVICE)
    queries = torch.randn(3, 2, 5, 16, device=fused.DEVICE)
    whole = fused.triton_buckets(queries, memory, 8, 33, 2**30)
    asked: list[int | None] = []
    valid = Memory.valid
    monkeypatch.setattr(Memory, "valid", lambda *of: asked.append(of[-1]) or valid(*of))
    parts = fused.triton_buckets(queries, memory, 8, 33, 1)
    assert asked == [70]
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("score_bytes", [None, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_the_search_reaches_its_recall_and_scores_in_fp32(
    fused: ModuleType,
    dtype: torch.dtype,
    score_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = filled(1500, [2000, 90, 10], 2, 32, dtype, fused.DEVICE)
    queries = torch.randn(3, 2, 40, 32, device=fused.DEVICE)
    choose = KernelChoice("triton", 20, "for the test")
    monkeypatch.setattr(bucketed, "choose_kernel", lambda *_: choose)
    found = BucketedSearch(0.9, score_bytes)(queries, memory, 16)
    expected = reference_search(queries, memory, 16)
    assert torch.equal(found.valid, expected.valid)
    hit = (found.slots[..., None, :] == expected.slots[..., None]).any(-1)
    assert hit[found.valid].float().mean() >= 0.9
    scores = (queries @ memory.keys_at(...).nan_to_num().mT).gather(-1, found.slots)
    scores = scores.masked_fill(~found.valid, -torch.inf)
    torch.testing.assert_close(scores, scores.sort(-1, descending=True).values)
    distinct = torch.where(found.valid, found.slots, -1 - torch.arange(16, device=scores.device))
    assert (distinct.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not policy.has_fused_kernel(), reason="needs a GPU that runs Triton")
def test_on_a_gpu_the_kernel_is_what_runs() -> None:
    memory = filled(4096, [4096, 100], 2, 64, torch.bfloat16, "cuda")
    queries = torch.randn(2, 2, 130, 64, device="cuda")
    search = BucketedSearch(0.95)
    found = search(queries, memory, 32)
    assert search.kernel is not None
    assert search.kernel.name == "triton"
    assert torch.equal(found.valid, reference_search(queries, memory, 32).valid)


def test_a_kernel_that_fails_is_replaced_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Neighbours:
        raise KernelFailed("out of shared memory")

    choice = KernelChoice("triton", 1, "for the test")
    monkeypatch.setattr(bucketed, "choose_kernel", lambda *_: choice)
    monkeypatch.setitem(policy.KERNELS, "triton", Kernel(fail, rough=True))
    memory = filled(500, [500], 1, 16, torch.float32, "cpu")
    queries = torch.randn(1, 1, 4, 16)
    search = BucketedSearch(0.9)
    for _ in range(2):
        found = search(queries, memory, 1)
        assert torch.equal(found.slots, reference_search(queries, memory, 1).slots)
    assert [record.getMessage() for record in caplog.records] == [
        "bucketed search continues in plain torch: out of shared memory"
    ]
