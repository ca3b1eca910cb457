"""Exact search: every slot scored in fp32, block by block, with a top-k that reads scores once.

The k best scores lie in the k buckets with the largest maxima, so it is enough to take a maximum
over small buckets, the top-k of those, and the top-k of the members of the chosen buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ring import Memory
from . import Neighbours
from .scan import SCORE_BYTES, score_blocks

BUCKET = 8
"""Members of a bucket in the first round; the second round sorts ``top_k * BUCKET`` scores."""


def top_k_exact(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same as ``scores.topk(top_k)`` over the last dimension (ties aside), faster when wide.

    Args:
        scores: (..., M) fp32.
        top_k: at most M.

    Returns:
        values and indices, each (..., top_k), best first.
    """
    width = scores.shape[-1]
    num_buckets = width // BUCKET
    if num_buckets < 2 * top_k:
        best = scores.topk(top_k, dim=-1)
        return best.values, best.indices
    folded = scores[..., : num_buckets * BUCKET].unflatten(-1, (BUCKET, num_buckets))
    chosen = folded.amax(dim=-2).topk(top_k, dim=-1, sorted=False).indices
    stride = torch.arange(BUCKET, device=scores.device) * num_buckets
    candidates = (chosen[..., None] + stride).flatten(-2)
    if num_buckets * BUCKET < width:
        rest = torch.arange(num_buckets * BUCKET, width, device=scores.device)
        rest = rest.expand(*candidates.shape[:-1], -1)
        candidates = torch.cat([candidates, rest], dim=-1)
    best = scores.gather(-1, candidates).topk(top_k, dim=-1)
    return best.values, candidates.gather(-1, best.indices)


class ExactSearch:
    """The true neighbours, in bounded memory.

    Args:
        score_bytes: bytes of scores that may live at once.
    """

    def __init__(self, score_bytes: int = SCORE_BYTES) -> None:
        self.score_bytes = score_bytes

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        batch, groups, count, _ = queries.shape
        shape = (batch, groups, count, top_k)
        best = torch.full(shape, -torch.inf, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        for rows, start, scores in score_blocks(queries, memory, self.score_bytes):
            values, index = top_k_exact(scores, min(top_k, scores.shape[-1]))
            index = index + start
            if start > 0:
                values = torch.cat([best[rows], values], dim=-1)
                index = torch.cat([slots[rows], index], dim=-1)
                values, order = values.topk(top_k, dim=-1)
                index = index.gather(-1, order)
            best[rows, :, :, : values.shape[-1]] = values
            slots[rows, :, :, : values.shape[-1]] = index
        return Neighbours(slots=slots, valid=best > -torch.inf)
