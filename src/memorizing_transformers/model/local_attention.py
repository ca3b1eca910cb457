"""Local attention in blocks of queries: what a CPU does, and a GPU where the mass is asked for.

A block's scores stay in the cache between product, softmax and sum, and the backward pass makes
them again rather than keep them. Keys behind all queries of a block are never touched. The T5 bias
is constant from some distance on, so it is added, and its gradient taken, near the diagonal only.

Shapes: B rows (b of a block), N segment, S keys of which the last N are the segment's, W = S - N
cached ones, H query heads, G key/value heads, R = H / G query heads a key/value head, D head width,
n queries of a block, s keys up to its last query, F distances with a bias of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Queries of a block: enough for the matrix product, few enough to waste little above the
diagonal."""
SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Scores of a block, as long as it holds more than one row: on a CPU what stays in its cache."""


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
    rows: slice
    queries: slice
    keys: int
    """s."""
    first: int
    """The first key under the band."""
    band: tuple[slice, slice, slice]
    """The part of the band that lies over the block's queries and the keys from ``first`` on."""


class _Weights:
    """Softmax weights of one block after the other, in buffers that all of them share.

    Args:
        q: (B, H, N, D) fp32.
        k: (B, G, S, D) fp32.
        band: see ``bias_band``.
        hidden: (B, W) cached places to leave out, or None.
    """

    def __init__(self, q: Tensor, k: Tensor, band: Tensor, hidden: Tensor | None) -> None:
        self.q, self.k, self.band, self.hidden = q, k, band, hidden
        self.groups = k.shape[1]
        row = q.shape[1] * band.shape[1] * k.shape[2]
        room = SCORES["cpu" if q.device.type == "cpu" else "cuda"]
        self.rows = max(1, min(q.shape[0], room // row))
        self.most = self.rows * row
        self.scores = q.new_empty(self.most)
        self.weights = q.new_empty(self.most)

    def blocks(self) -> Iterator[_Block]:
        """All blocks, rows that are done together last."""
        batch, _, queries, _ = self.q.shape
        keys, size = self.k.shape[2], self.band.shape[1]
        for row in range(0, batch, self.rows):
            for start in range(0, queries, size):
                stop = min(start + size, queries)
                seen = keys - queries + stop
                width = self.band.shape[2] - size + stop - start
                first = max(0, seen - width)
                part = (slice(None), slice(stop - start), slice(width - (seen - first), width))
                yield _Block(slice(row, row + self.rows), slice(start, stop), seen, first, part)

    def of_queries(self, x: Tensor, block: _Block) -> Tensor:
        """The block's queries (b * G, R * n, D) of x (B, H, N, D)."""
        chosen = x[block.rows, :, block.queries].unflatten(1, (self.groups, -1))
        return chosen.flatten(2, 3).flatten(0, 1)

    def of_keys(self, x: Tensor, block: _Block) -> Tensor:
        """The block's keys (b * G, s, D) of x (B, G, S, D)."""
        return x[block.rows, :, : block.keys].flatten(0, 1)

    def by_head(self, x: Tensor, block: _Block) -> Tensor:
        """Scores (b * G, R * n, s), or queries, as (b, H, n, ...)."""
        return x.view(-1, self.q.shape[1], block.queries.stop - block.queries.start, x.shape[-1])

    def buffer(self, flat: Tensor, block: _Block) -> Tensor:
        """Room for the block's scores (b * G, R * n, s) in a flat buffer."""
        rows = min(self.q.shape[0] - block.rows.start, self.rows) * self.groups
        count = self.q.shape[1] // self.groups * (block.queries.stop - block.queries.start)
        return flat[: rows * count * block.keys].view(rows, count, block.keys)

    def __call__(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Scores and weights (b * G, R * n, s)."""
        scores, weights = self.buffer(self.scores, block), self.buffer(self.weights, block)
        torch.bmm(self.of_queries(self.q, block), self.of_keys(self.k, block).mT, out=scores)
        by_head = self.by_head(scores, block)
        by_head[..., block.first :] += self.band[block.band]
        if self.hidden is not None:
            cached = by_head[..., : self.hidden.shape[1]]
            cached.masked_fill_(self.hidden[block.rows, None, None], -torch.inf)
        return scores, torch.softmax(scores, -1, out=weights)


def like_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D), as the projections want it."""
    batch, heads, count, width = x.shape
    return x.new_empty(batch, count, heads, width, dtype=dtype).transpose(1, 2)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        output, mass = attended(*arguments)
        ctx.save_for_backward(*arguments[:-1], output)
        return output, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return *gradients(*ctx.saved_tensors, *grads), None, None


def attended(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None, with_mass: bool
) -> tuple[Tensor, Tensor | None]:
    """Output (B, H, N, D) and log mass (B, H, N) of ``local_attention``, without a graph."""
    weigh = _Weights(q, k, band, hidden)
    output = like_heads(q, v.dtype)
    mass = q.new_empty(q.shape[:3]) if with_mass else None
    for block in weigh.blocks():
        scores, weights = weigh(block)
        found = weights.to(v.dtype).bmm(weigh.of_keys(v, block))
        output[block.rows, :, block.queries] = weigh.by_head(found, block)
        if mass is not None:
            # The largest weight is the exponential of the largest score less the mass.
            own = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
            mass[block.rows, :, block.queries] = weigh.by_head(own, block).squeeze(-1)
    return output, mass


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    hidden: Tensor | None,
    output: Tensor,
    d_output: Tensor,
    d_mass: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and band. Products that are no scores are made in the dtype of v."""
    weigh = _Weights(q, k, band, hidden)
    d_q, d_band = like_heads(q, torch.float32), torch.zeros_like(band)
    d_k, d_v = torch.zeros_like(k), torch.zeros_like(k)
    # A query's score gradients sum to the gradient of its mass.
    mean = (d_output.float() * output).sum(-1, keepdim=True)
    if d_mass is not None:
        mean = mean - d_mass[..., None]
    queries, keys = q.to(v.dtype), k.to(v.dtype)
    room = d_output.new_empty(weigh.most)
    for block in weigh.blocks():
        scores, weights = weigh(block)
        upstream = weigh.of_queries(d_output, block)
        seen = (block.rows, slice(None), slice(block.keys))
        d_v[seen] += weights.to(v.dtype).mT.bmm(upstream).view_as(d_v[seen])
        d_weights = weigh.buffer(room, block)
        torch.bmm(upstream, weigh.of_keys(v, block).mT, out=d_weights)
        d_scores = torch.sub(d_weights, weigh.of_queries(mean, block), out=scores)
        d_scores *= weights
        d_band[block.band] += weigh.by_head(d_scores, block)[..., block.first :].sum(0)
        d_scores = d_scores.to(v.dtype)
        own = d_scores.bmm(weigh.of_keys(keys, block))
        d_q[block.rows, :, block.queries] = weigh.by_head(own, block)
        own = d_scores.mT.bmm(weigh.of_queries(queries, block))
        d_k[seen] += own.view_as(d_k[seen])
    return d_q, d_k, d_v.to(v.dtype), d_band


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
