"""Inner products and weighted sums by index against the gathered tensors, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, Neighbours, attend, indexed
from memorizing_transformers.memory.indexed import Rows, dots, weighted_sum

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
@pytest.mark.parametrize(("writes", "load"), [(1, False), (3, False), (2, True)])
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


def test_nothing_is_kept_once_no_backward_can_come() -> None:
    memory = filled([12, 12])
    slots = torch.zeros(2, GROUPS, 5, 4, dtype=torch.int64)
    found = Neighbours(slots, slots == 0)
    queries = torch.randn(2, GROUPS, 5, WIDTH, requires_grad=True)
    output = attend(queries, memory, found)
    assert len(memory._readings) == 1
    del output
    assert len(memory._readings) == 0
    with torch.no_grad():
        kept = attend(queries, memory, found)
    assert kept.found.all()
    assert len(memory._readings) == 0
