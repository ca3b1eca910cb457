"""Inner products with, and weighted sums of, rows of a store chosen by index.

The two are each other's gradient. Both read rows in chunks, so the (B, G, Q, K, D) tensor of all
chosen rows never lives. The store itself gets no gradient.

Shapes: B rows, G key/value heads, Q queries, K neighbours, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import Reading

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Gathered rows that live at once: on a CPU what stays in its cache."""


class Rows(NamedTuple):
    """Chosen rows of a store; plain tensors, no gradient."""

    store: Tensor
    """(B, G, M, D) in its storage dtype."""
    slots: Tensor
    """(B, G, Q, K) int64, each in [0, M)."""
    valid: Tensor | None
    """(B, G, Q, K) bool, or None where every slot counts. The others count as zeros, even if the
    store holds NaN there."""
    scales: Tensor | None = None
    """(B, G, M) factor of each stored row, or None."""
    reading: Reading | None = None
    """Gives the store back as it was to a backward pass that comes after later writes."""

    def as_read(self) -> AbstractContextManager[None]:
        """Within, the store holds what it held at the time of the forward pass."""
        return nullcontext() if self.reading is None else self.reading.restored()


def _flat(rows: Rows) -> tuple[Tensor, Tensor]:
    """The store as (B * G * M, D) and the slots as indices (B * G * Q, K) into it."""
    batch, groups, size, width = rows.store.shape
    head = torch.arange(batch * groups, device=rows.slots.device).view(batch, groups, 1, 1)
    index = rows.slots + head * size
    return rows.store.reshape(-1, width), index.reshape(-1, index.shape[-1])


def _chunks(rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield queries and their rows (q, K, D) in fp32."""
    store, index = _flat(rows)
    count, neighbours = index.shape
    valid = None if rows.valid is None else rows.valid.reshape(count, neighbours)
    scales = None if rows.scales is None else rows.scales.reshape(-1)
    room = CHUNK_BYTES["cpu" if index.device.type == "cpu" else "cuda"]
    step = max(1, room // (4 * neighbours * store.shape[1]))
    for start in range(0, count, step):
        part = slice(start, start + step)
        chosen = index[part].reshape(-1)
        gathered = store.index_select(0, chosen).float()
        if scales is not None:
            gathered *= scales[chosen, None]
        gathered = gathered.view(-1, neighbours, store.shape[1])
        if valid is not None:
            gathered.masked_fill_(~valid[part, :, None], 0.0)
        yield part, gathered


def _dots(x: Tensor, rows: Rows) -> Tensor:
    flat = x.reshape(-1, 1, x.shape[-1])
    out = torch.empty(flat.shape[0], rows.slots.shape[-1], dtype=torch.float32, device=x.device)
    for part, gathered in _chunks(rows):
        # With x as the row, and not as the column, MKL is several times as fast.
        out[part] = torch.bmm(flat[part], gathered.mT).squeeze(1)
    return out.view(rows.slots.shape)


def _weighted_sum(weights: Tensor, rows: Rows) -> Tensor:
    batch, groups, _, width = rows.store.shape
    flat = weights.reshape(-1, weights.shape[-1])
    plain = rows.valid is None and rows.scales is None
    if plain and rows.store.dtype == torch.float32 and weights.device.type == "cpu":
        store, index = _flat(rows)
        out = F.embedding_bag(index, store, mode="sum", per_sample_weights=flat)
    else:
        out = torch.empty(flat.shape[0], width, dtype=torch.float32, device=weights.device)
        for part, gathered in _chunks(rows):
            out[part] = torch.bmm(flat[part, None], gathered).squeeze(1)
    return out.view(batch, groups, -1, width)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _dots(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.rows.as_read():
            return weighted_sum(grads[0], ctx.rows), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _weighted_sum(weights, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.rows.as_read():
            return dots(grads[0], ctx.rows), None


def dots(x: Tensor, rows: Rows) -> Tensor:
    """Inner products (B, G, Q, K) of x (B, G, Q, D) fp32 with its chosen rows."""
    return _Dots.apply(x, rows)


def weighted_sum(weights: Tensor, rows: Rows) -> Tensor:
    """Sums (B, G, Q, D) of chosen rows by weights (B, G, Q, K) fp32."""
    return _WeightedSum.apply(weights, rows)
