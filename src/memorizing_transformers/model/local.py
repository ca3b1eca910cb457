"""Local attention in blocks of queries, for a CPU.

A block's scores stay in the cache between product, softmax and sum, and the backward pass makes
them again rather than keep them. Keys behind all queries of a block are never touched. The T5 bias
is constant from some distance on, so it is added, and its gradient taken, near the diagonal only.

Shapes: B rows, N segment, S keys of which the last N are the segment's, W = S - N cached ones, H
query heads, G key/value heads, R = H / G query heads a key/value head, D head width, n queries of a
block, s keys up to its last query, F distances with a bias of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Queries of a block: enough for the matrix product, few enough to waste little above the
diagonal."""


def bias_band(near: Tensor, block: int) -> Tensor:
    """Bias around a block's diagonal (H, n, F + n - 1), minus infinity where the key lies behind.

    Its last column is the block's last key.

    Args:
        near: (H, F) bias at distances 0 to F - 1; beyond, it is 0.
        block: queries n of a block.
    """
    heads, distances = near.shape
    far, behind = near.new_zeros(heads, block - 1), near.new_full((heads, block - 1), -torch.inf)
    line = torch.cat([far, near.flip(1), behind], dim=1)
    return line.unfold(1, distances + block - 1, 1).flip(1)


class _Block(NamedTuple):
    queries: slice
    keys: int
    """s."""
    first: int
    """The first key under the band."""
    band: tuple[slice, slice, slice]
    """The part of the band that lies over the block's queries and the keys from ``first`` on."""


def _blocks(queries: int, keys: int, band: Tensor) -> Iterator[_Block]:
    size = band.shape[1]
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        seen = keys - queries + stop
        width = band.shape[2] - size + stop - start
        first = max(0, seen - width)
        rows, columns = slice(stop - start), slice(width - (seen - first), width)
        yield _Block(slice(start, stop), seen, first, (slice(None), rows, columns))


class _Weights:
    """Softmax weights of one block after the other, in buffers that all of them share.

    Args:
        q: (B, H, N, D) fp32.
        k: (B, G, S, D) fp32.
        band: see ``bias_band``.
        hidden: (B, W) cached places to leave out, or None.
    """

    def __init__(self, q: Tensor, k: Tensor, band: Tensor, hidden: Tensor | None) -> None:
        self.batch, self.heads, self.count, self.width = q.shape
        self.groups = k.shape[1]
        self.q, self.band, self.hidden = q, band, hidden
        self.keys = k.flatten(0, 1)
        self.most = self.batch * self.heads * band.shape[1] * k.shape[2]
        self.scores = q.new_empty(self.most)
        self.weights = q.new_empty(self.most)

    def rows(self, x: Tensor, block: _Block) -> Tensor:
        """The block's queries (B * G, R * n, D) of x (B, H, N, D)."""
        chosen = x[:, :, block.queries].unflatten(1, (self.groups, -1))
        return chosen.reshape(self.batch * self.groups, -1, x.shape[-1])

    def heads_of(self, x: Tensor) -> Tensor:
        """The inverse: (B, H, n, D) of rows (B * G, R * n, D)."""
        return x.view(self.batch, self.heads, -1, x.shape[-1])

    def buffer(self, flat: Tensor, block: _Block) -> Tensor:
        """Room for the block's scores (B * G, R * n, s) in a flat buffer."""
        rows = self.heads // self.groups * (block.queries.stop - block.queries.start)
        shape = (self.batch * self.groups, rows, block.keys)
        return flat[: shape[0] * shape[1] * shape[2]].view(shape)

    def by_head(self, x: Tensor) -> Tensor:
        """Scores (B * G, R * n, s) as (B, H, n, s)."""
        return x.view(self.batch, self.heads, -1, x.shape[-1])

    def __call__(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Scores and weights (B * G, R * n, s)."""
        scores, weights = self.buffer(self.scores, block), self.buffer(self.weights, block)
        torch.bmm(self.rows(self.q, block), self.keys[:, : block.keys].mT, out=scores)
        by_head = self.by_head(scores)
        by_head[..., block.first :] += self.band[block.band]
        if self.hidden is not None:
            cached = by_head[..., : self.hidden.shape[1]]
            cached.masked_fill_(self.hidden[:, None, None], -torch.inf)
        return scores, torch.softmax(scores, -1, out=weights)


def _like_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D), as the projections want it."""
    batch, heads, count, width = x.shape
    return x.new_empty(batch, count, heads, width, dtype=dtype).transpose(1, 2)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        band: Tensor,
        hidden: Tensor | None,
        with_mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        weigh, values = _Weights(q, k, band, hidden), v.flatten(0, 1)
        output = _like_heads(q, v.dtype)
        mass = q.new_empty(q.shape[:3]) if with_mass else None
        for block in _blocks(q.shape[2], k.shape[2], band):
            scores, weights = weigh(block)
            found = weights.to(v.dtype).bmm(values[:, : block.keys])
            output[:, :, block.queries] = weigh.heads_of(found)
            if mass is not None:
                # The largest weight is the exponential of the largest score less the mass.
                own = scores.amax(-1) - weights.amax(-1).log()
                mass[:, :, block.queries] = own.view(*q.shape[:2], -1)
        ctx.save_for_backward(q, k, v, band, hidden, output)
        return output, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, band, hidden, output = ctx.saved_tensors
        d_output, d_mass = grads
        kind = v.dtype
        weigh, values = _Weights(q, k, band, hidden), v.flatten(0, 1)
        # Those of the products below that are no scores are made in the dtype of the values.
        queries, keys = q.to(kind), weigh.keys.to(kind)
        d_q, d_band = _like_heads(q, torch.float32), torch.zeros_like(band)
        d_k = q.new_zeros(keys.shape)
        d_v = q.new_zeros(keys.shape)
        slack = (d_output.float() * output).sum(-1, keepdim=True)
        if d_mass is not None:
            slack = slack - d_mass[..., None]
        room = d_output.new_empty(weigh.most)
        for block in _blocks(q.shape[2], k.shape[2], band):
            scores, weights = weigh(block)
            seen = slice(block.keys)
            upstream = weigh.rows(d_output, block)
            d_v[:, seen] += weights.to(kind).mT.bmm(upstream)
            d_weights = weigh.buffer(room, block)
            torch.bmm(upstream, values[:, seen].mT, out=d_weights)
            d_scores = torch.sub(d_weights, weigh.rows(slack, block), out=scores)
            d_scores *= weights
            d_band[block.band] += weigh.by_head(d_scores)[..., block.first :].sum(0)
            d_scores = d_scores.to(kind)
            d_q[:, :, block.queries] = weigh.heads_of(d_scores.bmm(keys[:, seen]))
            d_k[:, seen] += d_scores.mT.bmm(weigh.rows(queries, block))
        return d_q, d_k.view_as(k), d_v.view_as(v).to(kind), d_band, None, None


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Tensor,
    hidden: Tensor | None = None,
    with_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last N of S consecutive tokens; scores and softmax in fp32.

    Args:
        q: (B, H, N, D) scaled queries.
        k: (B, G, S, D) keys.
        v: (B, G, S, D) values; their dtype is the output's.
        near: (H, F) fp32 bias at distances 0 to F - 1; beyond, it is 0.
        hidden: (B, W) bool, cached places that no query may see, or None.
        with_mass: also return the log of the summed exponentials of the scores.

    Returns:
        output (B, H, N, D) and log mass (B, H, N) fp32 or None.
    """
    with torch.autocast(q.device.type, enabled=False):
        band = bias_band(near.float(), min(BLOCK, q.shape[2]))
        output, mass = _LocalAttention.apply(q.float(), k.float(), v, band, hidden, with_mass)
    return output, mass
