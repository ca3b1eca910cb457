"""The best slot of each bucket in plain torch, for devices without a kernel of their own.

Shapes: B rows, G key/value heads, Q queries, K neighbours, D head width, L buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...view import Readable
from ..protocol import Neighbours
from .score_blocks import score_blocks

CANDIDATE_BYTES = 12
"""A bucket's best score and its slot."""

BucketMaxima = Callable[[Tensor, Readable, int, slice, int, Tensor], tuple[Tensor, Tensor]]
"""Takes queries (B, G, Q, D), the memory, L, the rows (b of them), the bytes of scores that may
live at once, and which slots of all rows count, as ``Readable.valid`` has it; returns scores
(b, G, Q, L) fp32, minus infinity where a bucket is empty, and slots (b, G, Q, L) int64."""


def row_groups(queries: Tensor, num_buckets: int, score_bytes: int) -> Iterator[slice]:
    """Rows whose candidates may live at once."""
    batch, groups, count, _ = queries.shape
    step = max(1, score_bytes // (groups * count * num_buckets * CANDIDATE_BYTES))
    for first in range(0, batch, step):
        yield slice(first, min(batch, first + step))


def best_buckets(
    maxima: BucketMaxima, queries: Tensor, memory: Readable, count: int, buckets: int, room: int
) -> Neighbours:
    """The ``count`` best of the maxima of ``buckets`` buckets, best first, in bounded memory."""
    shape = (*queries.shape[:3], count)
    slots = torch.empty(shape, dtype=torch.int64, device=queries.device)
    valid = torch.empty(shape, dtype=torch.bool, device=queries.device)
    counted = memory.valid(memory.max_fill)  # of all rows, so once for all groups of them
    for rows in row_groups(queries, buckets, room):
        scores, candidates = maxima(queries, memory, buckets, rows, room, counted)
        top = scores.topk(count, dim=-1)
        slots[rows] = candidates.gather(-1, top.indices)
        valid[rows] = top.values > -torch.inf
    return Neighbours(slots, valid)


def torch_maxima(
    queries: Tensor,
    memory: Readable,
    num_buckets: int,
    rows: slice,
    score_bytes: int,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``BucketMaxima`` from scores in fp32."""
    shape = (*queries[rows].shape[:3], num_buckets)
    best = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
    slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
    bucket = torch.arange(num_buckets, device=queries.device)
    blocks = score_blocks(queries, memory, score_bytes, num_buckets, rows, counted)
    for part, start, scores in blocks:
        own = slice(part.start - rows.start, part.stop - rows.start)
        ragged = -scores.shape[-1] % num_buckets
        if ragged:
            scores = F.pad(scores, (0, ragged), value=-torch.inf)
        values, turn = scores.unflatten(-1, (-1, num_buckets)).max(dim=-2)
        index = start + turn * num_buckets + bucket
        won = values > best[own]
        best[own] = torch.where(won, values, best[own])
        slots[own] = torch.where(won, index, slots[own])
    return best, slots


def torch_buckets(
    queries: Tensor, memory: Readable, count: int, buckets: int, score_bytes: int
) -> Neighbours:
    """The ``count`` best of the best slots of ``buckets`` buckets, by scores in fp32."""
    return best_buckets(torch_maxima, queries, memory, count, buckets, score_bytes)
