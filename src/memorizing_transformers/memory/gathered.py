"""Inner products with, and weighted sums of, rows of a store chosen by index.

The two are each other's gradient. Both read rows in chunks, so the (B, G, Q, K, D) tensor of all
chosen rows never lives. The store itself gets no gradient.

Shapes: B rows, G key/value heads, Q queries, K neighbours, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .snapshot import Snapshot
from .view import Readable

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Gathered rows that live at once: on a CPU what stays in its cache."""


class Rows(NamedTuple):
    """Chosen rows of a store; plain tensors, no gradient."""

    store: Tensor
    """(B, G, M, D) in its storage dtype."""
    slots: Tensor
    """(B', G, Q, K) int64, each in [0, M)."""
    valid: Tensor | None
    """(B, G, Q, K) bool, or None where every slot counts. The others count as zeros, even if the
    store holds NaN there."""
    scales: Tensor | None = None
    """(B, G, M) factor of each stored row, or None."""
    reading: Snapshot | None = None
    """Knows what the store held, for a backward pass that comes after later writes."""
    owners: Tensor | None = None
    """(B',) by row of ``slots``, the row of the store; None where they are the same."""

    def select(self, index: Tensor) -> Tensor:
        """Rows (n, D) in fp32 at flat indices (n,), as they were when ``reading`` was taken."""
        chosen = self._entries(self.store, index).float()
        if self.scales is not None:
            chosen *= self._entries(self.scales, index)[:, None]
        return chosen

    def _entries(self, store: Tensor, index: Tensor) -> Tensor:
        if self.reading is None:
            return store.flatten(0, 2).index_select(0, index)
        return self.reading.select(store, index)


def keys_of(
    memory: Readable, slots: Tensor, valid: Tensor | None, reading: Snapshot | None = None
) -> Rows:
    """The keys at ``slots`` (B', G, Q, K) of a memory."""
    return Rows(memory.keys, slots, valid, memory.key_scales, reading, memory.owners)


def values_of(
    memory: Readable, slots: Tensor, valid: Tensor | None, reading: Snapshot | None = None
) -> Rows:
    """The values at ``slots`` (B', G, Q, K) of a memory."""
    return Rows(memory.values, slots, valid, memory.value_scales, reading, memory.owners)


def _flat(rows: Rows) -> Tensor:
    """The slots as indices (B' * G * Q, K) into the store's first three dimensions."""
    batch, groups, size, _ = rows.store.shape
    head = torch.arange(batch * groups, device=rows.slots.device).view(batch, groups, 1, 1)
    if rows.owners is not None:
        head = head[rows.owners]
    return (rows.slots + head * size).reshape(-1, rows.slots.shape[-1])


def _chunks(rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield queries and their rows (q, K, D) in fp32."""
    index, width = _flat(rows), rows.store.shape[-1]
    count, neighbours = index.shape
    valid = None if rows.valid is None else rows.valid.reshape(count, neighbours)
    room = CHUNK_BYTES["cpu" if index.device.type == "cpu" else "cuda"]
    step = max(1, room // (4 * neighbours * width))
    for start in range(0, count, step):
        part = slice(start, start + step)
        gathered = rows.select(index[part].reshape(-1)).view(-1, neighbours, width)
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
    batch, groups, _, _ = rows.slots.shape
    width = rows.store.shape[-1]
    flat = weights.reshape(-1, weights.shape[-1])
    plain = rows.valid is None and rows.scales is None
    if plain and rows.store.dtype == torch.float32 and weights.device.type == "cpu":
        return _bags(flat, rows).view(batch, groups, -1, width)
    out = torch.empty(flat.shape[0], width, dtype=torch.float32, device=weights.device)
    for part, gathered in _chunks(rows):
        out[part] = torch.bmm(flat[part, None], gathered).squeeze(1)
    return out.view(batch, groups, -1, width)


def _bags(weights: Tensor, rows: Rows) -> Tensor:
    """Weighted sums (B * G * Q, D), as a CPU does them fastest: without gathering, if possible."""
    index = _flat(rows)
    if rows.reading is None or not rows.reading.differs(index.reshape(-1)):
        store = rows.store.flatten(0, 2)
        return F.embedding_bag(index, store, mode="sum", per_sample_weights=weights)
    out = torch.empty(len(index), rows.store.shape[-1], dtype=torch.float32)
    for part, gathered in _chunks(rows):
        own = torch.arange(gathered.shape[0] * gathered.shape[1]).view(gathered.shape[:2])
        # The same kernel, so the same rounding.
        out[part] = F.embedding_bag(
            own, gathered.flatten(0, 1), mode="sum", per_sample_weights=weights[part]
        )
    return out


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _dots(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return weighted_sum(grads[0], ctx.rows), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _weighted_sum(weights, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return dots(grads[0], ctx.rows), None


def dots(x: Tensor, rows: Rows) -> Tensor:
    """Inner products (B, G, Q, K) of x (B, G, Q, D) fp32 with its chosen rows."""
    return _Dots.apply(x, rows)


def weighted_sum(weights: Tensor, rows: Rows) -> Tensor:
    """Sums (B, G, Q, D) of chosen rows by weights (B, G, Q, K) fp32."""
    return _WeightedSum.apply(weights, rows)
