"""Views: several rows read one memory, and several memories are read as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import (
    SEARCHES,
    Memory,
    MemoryView,
    Neighbours,
    attend,
    make_search,
    merge,
)
from memorizing_transformers.memory.search.policy import KERNELS
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.memory.search.reference import reference_search

HEADS, WIDTH, SIZE = 2, 8, 50
OWNERS = [2, 0, 0, 1, 2, 2]


def filled(dtype: torch.dtype = torch.float32, size: int = SIZE) -> Memory:
    """Rows of several fills, one past its capacity, one with dropped pairs; NaN where unused."""
    memory = Memory(3, HEADS, size, WIDTH, dtype)
    if dtype != torch.int8:
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)
    for counts in ([20, 7, 9], [20, 0, 30], [20, 0, 1]):
        longest = max(counts)
        mask = torch.arange(longest) < torch.tensor(counts)[:, None]
        memory.write(*torch.randn(2, 3, HEADS, longest, WIDTH), mask)
    memory.drop(torch.tensor([0, 2, 5]))
    return memory


def copied(memory: Memory, owners: list[int]) -> Memory:
    """A memory whose rows are copies of the owners' rows."""
    copy = Memory(len(owners), HEADS, memory.size, WIDTH, memory.keys.dtype)
    copy.load({name: tensor[owners] for name, tensor in memory.tensors().items()})
    return copy


def queries(rows: int = len(OWNERS), count: int = 40) -> Tensor:
    return torch.randn(rows, HEADS, count, WIDTH)


def assert_same(ours: Neighbours, theirs: Neighbours) -> None:
    assert torch.equal(ours.valid, theirs.valid)
    assert torch.equal(ours.slots[ours.valid], theirs.slots[theirs.valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_view_is_searched_as_a_copy_of_its_rows_would_be(name: str, dtype: torch.dtype) -> None:
    if name.startswith("faiss"):
        pytest.importorskip("faiss")
    memory, asked = filled(dtype), queries()
    view, copy = MemoryView(memory, OWNERS), copied(memory, OWNERS)
    for _ in range(2):
        found, expected = (make_search(name)(asked, x, 6) for x in (view, copy))
        assert_same(found, expected)
    assert measured_recall(make_search(name), asked, view, 6) == 1.0


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "triton"])
def test_every_kernel_reads_through_a_view(name: str) -> None:
    memory, asked = filled(size=700), queries(count=130)
    view, copy = MemoryView(memory, OWNERS), copied(memory, OWNERS)
    found, expected = (KERNELS[name].run(asked, x, 6, 13, 2**14) for x in (view, copy))
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_attention_and_its_gradients_are_those_of_a_copy(dtype: torch.dtype) -> None:
    memory, asked = filled(dtype), queries()
    bias = torch.randn(*asked.shape[:3], 6)
    outcomes = []
    for seen in (MemoryView(memory, OWNERS), copied(memory, OWNERS)):
        live, added = asked.clone().requires_grad_(), bias.clone().requires_grad_()
        found = attend(live, seen, reference_search(asked, seen, 6), added)
        seen.base.write(*torch.randn(2, seen.base.keys.shape[0], HEADS, 30, WIDTH))
        (found.output * found.found[..., None]).square().sum().backward()
        outcomes.append([*found, live.grad, added.grad])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_a_view_follows_its_memory_and_copies_nothing() -> None:
    memory = filled()
    view = MemoryView(memory, [1, 1])
    assert view.keys is memory.keys
    pairs = torch.randn(2, 3, HEADS, 4, WIDTH)
    memory.write(*pairs, token_ids=torch.full((3, 4), 5), step=7)
    slots = memory.valid()[1] & (memory.steps[1] == 7)
    assert (view.token_ids[:, slots] == 5).all()
    assert view.fill.tolist() == [memory.fill[1]] * 2
    memory.reset(torch.tensor([False, True, False]))
    assert not reference_search(queries(2), view, 3).valid.any()


@pytest.mark.parametrize("name", ["write", "reset", "load", "drop", "tensors", "rewound"])
def test_nothing_is_written_through_a_view(name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(MemoryView(filled(), OWNERS), name)


@pytest.mark.parametrize("owners", [[3], [-1], [0, 7]])
def test_rows_that_the_memory_lacks_are_refused(owners: list[int]) -> None:
    with pytest.raises(ValueError, match="rows 0 to 2"):
        MemoryView(filled(), owners)


@pytest.mark.parametrize("empty", [[], [0], [1, 2], [0, 1, 2]])
def test_merged_memories_are_as_one(empty: list[int]) -> None:
    """With all pairs retrieved, attention over parts is attention over one memory of all pairs."""
    sizes, asked = (9, 4, 6), queries(2).requires_grad_()
    parts = [torch.randn(2, 2, HEADS, size, WIDTH) for size in sizes]
    memories = [Memory(2, HEADS, size, WIDTH) for size in sizes]
    whole = Memory(2, HEADS, sum(sizes), WIDTH)
    for number, (memory, pairs) in enumerate(zip(memories, parts, strict=True)):
        if number not in empty:
            memory.write(*pairs)
            whole.write(*pairs)
        else:
            memory.keys.fill_(torch.nan)
    found = [
        attend(asked, memory, reference_search(asked.detach(), memory, memory.size))
        for memory in memories
    ]
    expected = attend(asked, whole, reference_search(asked.detach(), whole, whole.size))
    merged = merge(found)
    assert torch.equal(merged.found, expected.found)
    if len(empty) == 3:
        assert not merged.found.any()
        return
    torch.testing.assert_close(merged.output, expected.output)
    torch.testing.assert_close(merged.log_mass, expected.log_mass)
    torch.testing.assert_close(merged.weights.sum(-1), torch.ones(merged.found.shape))
    grads = [torch.autograd.grad(x.output.square().sum(), asked)[0] for x in (merged, expected)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_a_row_that_finds_nothing_anywhere_gets_no_gradient_and_harms_no_other() -> None:
    asked = queries(2).requires_grad_()
    memories = [Memory(2, HEADS, 8, WIDTH) for _ in range(2)]
    for memory in memories:
        memory.write(*torch.randn(2, 2, HEADS, 5, WIDTH))
        memory.reset(torch.tensor([True, False]))
    merged = merge([attend(asked, m, reference_search(asked.detach(), m, 3)) for m in memories])
    (merged.output * merged.found[..., None]).square().sum().backward()
    assert asked.grad is not None
    assert asked.grad.isfinite().all()
    assert not asked.grad[0].any()
    assert asked.grad[1].any()
