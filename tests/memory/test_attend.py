"""Attention over retrieved pairs against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, Neighbours, attend, make_search
from memorizing_transformers.memory.search.reference import reference_search

ROWS, HEADS, QUERIES, WIDTH = 3, 2, 5, 4


def filled(size: int, written: list[int]) -> Memory:
    """A memory whose unused slots hold NaN."""
    memory = Memory(ROWS, HEADS, size, WIDTH)
    memory.keys.fill_(torch.nan)
    memory.values.fill_(torch.nan)
    longest = max(written)
    pairs = torch.randn(2, ROWS, HEADS, longest, WIDTH)
    memory.write(*pairs, torch.arange(longest) < torch.tensor(written)[:, None])
    return memory


def by_loops(
    queries: Tensor, memory: Memory, found: Neighbours, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs (zero where nothing was found) and log masses (minus infinity there)."""
    outputs, masses = [], []
    for row, head, query in torch.cartesian_prod(*map(torch.arange, (ROWS, HEADS, QUERIES))):
        scores, values = [], []
        for place in range(found.slots.shape[-1]):
            if found.valid[row, head, query, place]:
                slot = found.slots[row, head, query, place]
                score = (queries[row, head, query] * memory.keys[row, head, slot]).sum()
                if bias is not None:
                    score = score + bias[row, head, query, place]
                scores.append(score)
                values.append(memory.values[row, head, slot])
        if scores:
            weights = torch.stack(scores).softmax(0)
            outputs.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            masses.append(torch.stack(scores).exp().sum().log())
        else:
            outputs.append(torch.zeros(WIDTH))
            masses.append(torch.tensor(-torch.inf))
    shape = (ROWS, HEADS, QUERIES)
    return torch.stack(outputs).view(*shape, WIDTH), torch.stack(masses).view(shape)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("written", [[9, 7, 20], [2, 0, 9], [0, 0, 1]], ids=str)
def test_outputs_and_gradients_equal_loops(written: list[int], with_bias: bool) -> None:
    memory = filled(9, written)
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH, requires_grad=True)
    found = reference_search(queries.detach(), memory, 4)
    bias = torch.randn(found.slots.shape, requires_grad=True) if with_bias else None
    upstream = torch.randn(ROWS, HEADS, QUERIES, WIDTH + 1)
    results = []
    for naive in (False, True):
        if naive:
            output, mass = by_loops(queries, memory, found, bias)
        else:
            output, mass, _, _ = attend(queries, memory, found, bias)
        there = found.valid.any(-1)
        output = torch.where(there[..., None], output, 0.0)
        mass = torch.where(there, mass, 0.0)
        loss = (torch.cat([output, mass[..., None]], -1) * upstream).sum()
        wanted = [queries] if bias is None else [queries, bias]
        results.append((output, mass, *torch.autograd.grad(loss, wanted)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_weights_are_a_softmax_over_what_was_found() -> None:
    memory = filled(9, [9, 2, 0])
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH)
    found = reference_search(queries, memory, 4)
    outcome = attend(queries, memory, found)
    torch.testing.assert_close(outcome.weights[:2].sum(-1), torch.ones(2, HEADS, QUERIES))
    assert (outcome.weights[1, ..., 2:] == 0).all()
    assert outcome.found.tolist() == found.valid.any(-1).tolist()
    assert not outcome.found[2].any()


def test_rubbish_in_unused_slots_reaches_neither_outputs_nor_gradients() -> None:
    memory = filled(9, [2, 0, 9])
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH, requires_grad=True)
    found = reference_search(queries.detach(), memory, 4)
    found = found._replace(slots=found.slots.masked_fill(~found.valid, 8))
    outcome = attend(queries, memory, found)
    (gradient,) = torch.autograd.grad(outcome.output.sum() + outcome.log_mass.sum(), queries)
    for tensor in (outcome.output, outcome.log_mass, outcome.weights, gradient):
        assert tensor.isfinite().all()


def test_no_gradient_reaches_stored_pairs() -> None:
    memory = filled(9, [9, 9, 9])
    memory.keys.requires_grad_()
    memory.values.requires_grad_()
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH, requires_grad=True)
    found = reference_search(queries.detach(), memory, 4)
    attend(queries, memory, found).output.sum().backward()
    assert queries.grad is not None
    assert memory.keys.grad is None
    assert memory.values.grad is None


def test_stored_bf16_is_attended_in_fp32_under_autocast() -> None:
    memory = Memory(ROWS, HEADS, 9, WIDTH, torch.bfloat16)
    memory.write(*torch.randn(2, ROWS, HEADS, 9, WIDTH))
    queries = torch.randn(ROWS, HEADS, QUERIES, WIDTH)
    found = reference_search(queries, memory, 4)
    plain = attend(queries, memory, found)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(queries, memory, found)
    assert mixed.output.dtype == torch.float32
    assert torch.equal(mixed.output, plain.output)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_fp32_throughout_whatever_the_default_dtype(default: torch.dtype) -> None:
    """Lightning's bf16-true and 64-true set the default; scores and outputs stay fp32."""
    memory = Memory(1, 2, 64, 8)
    pairs = torch.randn(1, 2, 64, 8)
    memory.write(pairs, pairs)
    queries = torch.randn(1, 2, 5, 8)
    expected = attend(queries, memory, make_search("exact")(queries, memory, 4)).output
    torch.set_default_dtype(default)
    try:
        got = attend(queries, memory, make_search("exact")(queries, memory, 4)).output
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
