"""Attention over retrieved pairs.

Shapes: B rows, G key/value heads, Q queries of a head group, K neighbours, M slots, D head width.

Retrieved keys are scored again with live queries: gradient reaches queries (and through them scale
and gate), never the stored pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .gathered import dots, keys_of, values_of, weighted_sum
from .lent import LentMemory
from .search import Neighbours
from .view import Readable


class MemoryAttention(NamedTuple):
    """The outcome of attending to neighbours."""

    output: Tensor
    """(B, G, Q, D) fp32, weighted mean of the retrieved values; meaningless where not ``found``."""
    log_mass: Tensor
    """(B, G, Q) fp32, log of the summed exponentials of the scores."""
    weights: Tensor
    """(B, G, Q, K) fp32 softmax over the neighbours."""
    found: Tensor
    """(B, G, Q) bool; False where the row's memory was empty."""


def attend(
    queries: Tensor,
    memory: Readable,
    neighbours: Neighbours,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> MemoryAttention:
    """Softmax attention of live queries over their neighbours, in fp32.

    Args:
        queries: (B, G, Q, D) scaled, so that the inner product with a key is the score.
        memory: where the neighbours live.
        neighbours: what the search found.
        bias: (B, G, Q, K) added to the scores, or None.
        softcap: bound c of the scores, which become ``c tanh(score / c)`` before the bias is added,
            or None.
    """
    valid = neighbours.valid
    live = queries.requires_grad or (bias is not None and bias.requires_grad)
    with torch.autocast(queries.device.type, enabled=False):
        score, mean = _products(memory, neighbours, torch.is_grad_enabled() and live)
        scores = score(queries.float())
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        found = valid.any(-1)
        scores = scores.masked_fill(~valid & found[..., None], -torch.inf)
        log_mass = scores.logsumexp(-1)
        weights = (scores - log_mass[..., None]).exp()
        output = mean(weights)
    return MemoryAttention(output, log_mass, weights, found)


def scores_of(queries: Tensor, memory: Readable, neighbours: Neighbours) -> Tensor:
    """Inner products (B, G, Q, K) of queries (B, G, Q, D) fp32 with their neighbours' keys."""
    return _products(memory, neighbours, False)[0](queries)


def _products(
    memory: Readable | LentMemory, neighbours: Neighbours, differentiated: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Inner products with the keys, and sums of the values by weights."""
    slots, valid = neighbours
    slots = slots.masked_fill(~valid, 0)
    if isinstance(memory, LentMemory):
        return partial(memory.dots, slots, valid), partial(memory.weighted_sum, slots, valid)
    # An empty slot may hold anything, and 0 x NaN is NaN. Asking costs a wait on a GPU.
    counted = valid if slots.is_cuda or not valid.all() else None
    reading = memory.snapshot() if differentiated else None
    keys = keys_of(memory, slots, counted, reading)
    values = values_of(memory, slots, counted, reading)
    return partial(dots, rows=keys), partial(weighted_sum, rows=values)


def merge(parts: Sequence[MemoryAttention]) -> MemoryAttention:
    """Attention over several memories as over one: one softmax over all that was found in them.

    Each part counts by its share of the summed exponentials. The neighbours of the parts follow one
    another.

    Args:
        parts: of the same queries, each over another memory.
    """
    found = torch.stack([part.found for part in parts])
    any_found = found.any(0)
    masses = torch.stack([part.log_mass for part in parts]).masked_fill(~found, -torch.inf)
    # Nothing but minus infinity would make the gradient no number.
    masses = masses.masked_fill(~any_found, 0.0)
    total = masses.logsumexp(0)
    shares = (masses - total).exp()
    outputs = [
        share[..., None] * part.output.masked_fill(~part.found[..., None], 0.0)
        for share, part in zip(shares, parts, strict=True)
    ]
    weights = [share[..., None] * part.weights for share, part in zip(shares, parts, strict=True)]
    return MemoryAttention(
        torch.stack(outputs).sum(0), total, torch.cat(weights, dim=-1), any_found
    )
