"""Inner products and weighted sums by index against the gathered tensors, with their gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peak import Peak
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memorizing_transformers.memory import Memory, Neighbours, attend
from memorizing_transformers.memory import gathered as indexed
from memorizing_transformers.memory.gathered import Rows, dots, weighted_sum
from memorizing_transformers.memory.search.reference import reference_search

BATCH, GROUPS, SIZE, WIDTH = 2, 3, 31, 8


def chosen(rows: Rows) -> Tensor:
    """The tensor that is never built: (B, G, Q, K, D), zeros where not valid."""
    batch = torch.arange(BATCH)[:, None, None, None]
    group = torch.arange(GROUPS)[None, :, None, None]
    gathered = rows.store[batch, group, rows.slots].float()
    if rows.scales is not None:
        gathered = gathered * rows.scales[batch, group, rows.slots][..., None]
    if rows.valid is not None:
        gathered = gathered.masked_fill(~rows.valid[..., None], 0.0)
    return gathered


def some_rows(dtype: torch.dtype, masked: bool, scaled: bool, count: int, top_k: int) -> Rows:
    """Random rows; where masked, the unused ones hold NaN."""
    store = torch.randn(BATCH, GROUPS, SIZE, WIDTH).to(dtype)
    slots = torch.randint(SIZE, (BATCH, GROUPS, count, top_k))
    valid = None
    if masked:
        valid = slots > 3
        store[:, :, :4] = torch.nan
    return Rows(store, slots, valid, torch.rand(BATCH, GROUPS, SIZE) if scaled else None)


@pytest.mark.parametrize("chunk", [2**21, 300], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "top_k"), [(63, 5), (1, 1), (7, 31)])
def test_both_equal_the_gathered_form(
    count: int,
    top_k: int,
    dtype: torch.dtype,
    masked: bool,
    scaled: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(indexed.CHUNK_BYTES, "cpu", chunk)
    rows = some_rows(dtype, masked, scaled, count, top_k)
    x = torch.randn(BATCH, GROUPS, count, WIDTH, requires_grad=True)
    w = torch.randn(BATCH, GROUPS, count, top_k, requires_grad=True)
    ours = dots(x, rows), weighted_sum(w, rows)
    naive = (
        torch.einsum("bgqd,bgqkd->bgqk", x, chosen(rows)),
        torch.einsum("bgqk,bgqkd->bgqd", w, chosen(rows)),
    )
    for one, other, leaf in zip(ours, naive, (x, w), strict=True):
        torch.testing.assert_close(one, other)
        grad = torch.randn_like(one)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, leaf, grad)[0] for y in (one, other)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:Input")
def test_gradients_pass_numerical_checks_twice() -> None:
    rows = some_rows(torch.float32, False, False, 2, 3)
    x = torch.randn(BATCH, GROUPS, 2, WIDTH, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        return weighted_sum(dots(x, rows).softmax(-1), rows)

    assert torch.autograd.gradgradcheck(
        both, (x,), eps=1e-2, atol=5e-2, rtol=5e-2, nondet_tol=1e-5, fast_mode=True
    )


def filled(written: list[int], size: int = 12, dtype: torch.dtype = torch.float32) -> Memory:
    """A memory with so many pairs a row, NaN in the slots that were never used."""
    memory = Memory(len(written), GROUPS, size, WIDTH, dtype)
    if memory.key_scales is not None and memory.value_scales is not None:
        memory.key_scales.fill_(torch.nan)
        memory.value_scales.fill_(torch.nan)
    else:
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)
    longest = max(written)
    pairs = torch.randn(2, len(written), GROUPS, longest, WIDTH)
    memory.write(*pairs, torch.arange(longest) < torch.tensor(written)[:, None])
    return memory


def attention_gradient(memory: Memory, queries: Tensor, writes: int, load: bool) -> Tensor:
    """The queries' gradient, with commits and a load between forward and backward."""
    torch.manual_seed(1)
    slots = torch.randint(12, (2, GROUPS, 5, 4))
    leaf = queries.clone().requires_grad_()
    output = attend(leaf, memory, Neighbours(slots, slots < memory.fill[:, None, None, None]))
    for _ in range(writes):
        memory.write(*torch.randn(2, 2, GROUPS, 7, WIDTH))
    if load:
        memory.load({name: x.clone() for name, x in filled([12, 12]).tensors().items()})
    weights = torch.linspace(-1, 1, WIDTH)
    (output.output[output.found] * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("written", [[12, 5], [30, 0]], ids=str)
@pytest.mark.parametrize(("writes", "load"), [(1, False), (3, False), (0, True), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_backward_reads_what_forward_read(
    written: list[int], writes: int, load: bool, dtype: torch.dtype
) -> None:
    """Commits between forward and backward change neither the gradient nor what they wrote."""
    queries = torch.randn(2, GROUPS, 5, WIDTH)
    memories = [filled(written, dtype=dtype) for _ in range(2)]
    memories[1].load(memories[0].tensors())
    before = attention_gradient(memories[0], queries, 0, False)
    after = attention_gradient(memories[1], queries, writes, load)
    assert torch.isfinite(before).all()
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_backward_leaves_the_memory_as_it_was_written(dtype: torch.dtype) -> None:
    memory = filled([12, 12], dtype=dtype)
    queries = torch.randn(2, GROUPS, 5, WIDTH, requires_grad=True)
    slots = torch.randint(12, (2, GROUPS, 5, 4))
    output = attend(queries, memory, Neighbours(slots, torch.ones_like(slots, dtype=torch.bool)))
    for _ in range(2):
        memory.write(*torch.randn(2, 2, GROUPS, 7, WIDTH))
    written = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    output.output.sum().backward()
    assert all(torch.equal(tensor, written[name]) for name, tensor in memory.tensors().items())


class DuringBackward(TorchDispatchMode):
    """Calls something before every operation."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.look()
        return func(*args, **(kwargs or {}))


def waiting(dtype: torch.dtype) -> tuple[Memory, Tensor, Tensor]:
    """A memory that was written since it was read, the queries, and a loss to go backward from."""
    memory = filled([12, 12], dtype=dtype)
    queries = torch.randn(2, GROUPS, 5, WIDTH, requires_grad=True)
    slots = torch.randint(12, (2, GROUPS, 5, 4))
    output = attend(queries, memory, Neighbours(slots, torch.ones_like(slots, dtype=torch.bool)))
    for _ in range(2):
        memory.write(*torch.randn(2, 2, GROUPS, 7, WIDTH))
    return memory, queries, output.output.square().sum() + output.log_mass.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_others_read_what_was_written_while_a_backward_pass_runs(dtype: torch.dtype) -> None:
    memory, queries, loss = waiting(dtype)
    asked = torch.randn(2, GROUPS, 3, WIDTH)

    def read() -> Tensor:
        with torch.no_grad():
            return attend(asked, memory, reference_search(asked, memory, 4)).output

    expected = read()
    with ThreadPoolExecutor(1) as other:
        seen: list[Tensor] = []
        with DuringBackward(lambda: seen.append(other.submit(read).result())):
            loss.backward()
    assert len(seen) > 10
    assert all(torch.equal(found, expected) for found in seen)
    assert queries.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_interrupted_at_any_point_a_backward_pass_leaves_the_memory_as_it_was(
    dtype: torch.dtype,
) -> None:
    memory, queries, loss = waiting(dtype)
    written = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    (whole,) = torch.autograd.grad(loss, queries, retain_graph=True)
    with DuringBackward(lambda: None) as counted:
        torch.autograd.grad(loss, queries, retain_graph=True)
    for last in range(1, counted.operations + 1):
        left = iter([None] * (last - 1))

        def stop(left: Iterator[None] = left) -> None:
            if next(left, "none left") is not None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), DuringBackward(stop):
            torch.autograd.grad(loss, queries, retain_graph=True)
        for name, tensor in memory.tensors().items():
            assert torch.equal(tensor, written[name]), (last, name)
    (again,) = torch.autograd.grad(loss, queries)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_many_late_backward_passes_agree_with_immediate_ones(
    dtype: torch.dtype, shuffled: bool
) -> None:
    """Eight segments read and written before the first backward pass."""
    gradients: list[list[Tensor]] = []
    for late in (False, True):
        torch.manual_seed(2)
        memory, found, pending = filled([9, 12], dtype=dtype), [], []
        for _ in range(8):
            queries = torch.randn(2, GROUPS, 5, WIDTH, requires_grad=True)
            asked = reference_search(queries.detach().clone(), memory, 4)
            loss = attend(queries, memory, asked).output.square().sum()
            pending.append((loss, queries))
            if not late:
                found.append(torch.autograd.grad(loss, queries)[0])
            memory.write(*torch.randn(2, 2, GROUPS, 5, WIDTH))
        if late:
            order = torch.randperm(8).tolist() if shuffled else range(8)
            made = {place: torch.autograd.grad(*pending[place])[0] for place in order}
            found = [made[place] for place in range(8)]
        gradients.append(found)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_copies_are_kept_only_while_a_backward_pass_can_come(dtype: torch.dtype) -> None:
    """Bytes that a write leaves behind: some behind a reading, none without one."""
    memory = filled([12, 12], dtype=dtype)
    slots = torch.zeros(2, GROUPS, 5, 4, dtype=torch.int64)
    found = Neighbours(slots, slots == 0)
    queries = torch.randn(2, GROUPS, 5, WIDTH, requires_grad=True)
    bounds = memory.bound.nbytes  # new ones take the place of the old

    def left_behind() -> int:
        pairs = torch.randn(2, 2, GROUPS, 7, WIDTH)
        with Peak() as measured:
            memory.write(*pairs)
            gc.collect()
        return measured.live

    assert left_behind() <= bounds
    output = attend(queries, memory, found)
    copies = 2 * 7 * GROUPS * WIDTH * 2 * memory.keys.element_size()
    assert copies <= left_behind() < 3 * copies + 4096
    del output
    assert left_behind() <= bounds
    with torch.no_grad():
        kept = attend(queries, memory, found)
    assert kept.found.all()
    assert left_behind() <= bounds
