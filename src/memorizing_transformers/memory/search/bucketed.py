"""Approximate search in one pass: the best slot of each of L buckets, then the top-k of those.

Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s", 2022. A neighbour is lost when a
better one shares its bucket. Slots are dealt to buckets like cards (slot modulo L), so consecutive
tokens, which resemble each other, never meet.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ring import Memory
from . import Neighbours
from .scan import SCORE_BYTES, score_blocks


def num_buckets_for(top_k: int, recall_target: float) -> int:
    """Buckets L for an expected recall of at least ``recall_target``.

    With neighbours dealt at random a neighbour survives its k - 1 rivals with probability
    ``(1 - 1/L)^(k - 1)`` at least, hence ``L = 1 / (1 - r^(1 / (k - 1)))`` (Chern et al., section
    on recall).
    """
    if top_k == 1:
        return 1
    return math.ceil(1 / (1 - recall_target ** (1 / (top_k - 1))))


class BucketedSearch:
    """Neighbours with an expected recall of ``recall_target``, exact where the memory is small.

    Args:
        recall_target: expected share of the true neighbours, in (0, 1).
        score_bytes: bytes of scores that may live at once.
    """

    def __init__(self, recall_target: float = 0.95, score_bytes: int = SCORE_BYTES) -> None:
        self.recall_target = recall_target
        self.score_bytes = score_bytes

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        batch, groups, count, _ = queries.shape
        num_buckets = max(top_k, num_buckets_for(top_k, self.recall_target))
        shape = (batch, groups, count, num_buckets)
        best = torch.full(shape, -torch.inf, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        bucket = torch.arange(num_buckets, device=queries.device)
        for rows, start, scores in score_blocks(queries, memory, self.score_bytes, num_buckets):
            ragged = -scores.shape[-1] % num_buckets
            if ragged:
                scores = F.pad(scores, (0, ragged), value=-torch.inf)
            values, turn = scores.unflatten(-1, (-1, num_buckets)).max(dim=-2)
            index = start + turn * num_buckets + bucket
            won = values > best[rows]
            best[rows] = torch.where(won, values, best[rows])
            slots[rows] = torch.where(won, index, slots[rows])
        top = best.topk(top_k, dim=-1)
        return Neighbours(slots=slots.gather(-1, top.indices), valid=top.values > -torch.inf)
