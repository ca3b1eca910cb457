"""Approximate search in one pass: the best slot of each of L buckets, then the top-k of those.

Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s", 2022. A neighbour is lost when a
better one shares its bucket. Buckets are dealt like cards, slots of a bucket standing far apart, so
consecutive tokens, which resemble each other, never meet, nor those at the same place of segments
(``apart``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indexed import Rows, dots
from ..ring import Memory
from . import Neighbours
from .host import SCORE_BYTES as HOST_SCORE_BYTES
from .host import HostScan, apart
from .largest import members_for
from .quantized import has_fast_int8, quantized_search
from .scan import SCORE_BYTES, score_blocks

ROUGH_RECALL = 0.97
"""Recall targets up to this one allow rough scores, in int8 or bfloat16, where they are fast."""
SPARE = 4
"""One spare candidate for every so many neighbours makes up for ranks that bfloat16 confuses."""


ROUGH_SLOTS = 32768
"""With fewer, an exact search costs a CPU less: scoring candidates again outweighs what bfloat16
saves, and in fp32 buckets save nothing."""
QUANTIZED_SLOTS = 4096
"""With fewer, int8 saves less than it costs to prepare; measured at widths of 32 and 64."""
QUANTIZED_QUERIES = 128
"""For fewer queries a head, likewise."""
FEW_QUERIES = 16
"""For fewer queries than this, reading the keys is all the cost there is."""


def num_buckets_for(top_k: int, recall_target: float) -> int:
    """Buckets L for an expected recall of at least ``recall_target``.

    With neighbours dealt at random a neighbour survives its k - 1 rivals with probability
    ``(1 - 1/L)^(k - 1)`` at least, hence ``L = 1 / (1 - r^(1 / (k - 1)))`` (Chern et al., section
    on recall).
    """
    if top_k == 1:
        return 1
    return math.ceil(1 / (1 - recall_target ** (1 / (top_k - 1))))


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class BucketedSearch:
    """Neighbours with an expected recall of ``recall_target``, exact where the memory is small.

    On a CPU more buckets cost little, so there are more than needed, until each has 32 slots; where
    it has instructions for them, rough scores in int8 choose the candidates.

    Args:
        recall_target: expected share of the true neighbours, in (0, 1).
        score_bytes: bytes of scores that may live at once; None for what suits the device.
    """

    def __init__(self, recall_target: float = 0.95, score_bytes: int | None = None) -> None:
        self.recall_target = recall_target
        self.score_bytes = score_bytes

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        num_buckets = apart(max(top_k, num_buckets_for(top_k, self.recall_target)))
        if queries.device.type == "cpu":
            return self._on_host(queries, memory, top_k, num_buckets)
        return self._on_device(queries, memory, top_k, num_buckets)

    def _on_host(self, queries: Tensor, memory: Memory, top_k: int, num_buckets: int) -> Neighbours:
        room = self.score_bytes or HOST_SCORE_BYTES
        rough = self.recall_target <= ROUGH_RECALL
        enough = memory.max_fill >= QUANTIZED_SLOTS and queries.shape[2] >= QUANTIZED_QUERIES
        if rough and enough and has_fast_int8():
            return quantized_search(queries, memory, top_k, room)
        small = memory.max_fill < max(ROUGH_SLOTS, members_for(top_k) * num_buckets)
        if small or queries.shape[2] < FEW_QUERIES:
            return HostScan(None, torch.float32, room)(queries, memory, top_k)
        if not (rough and has_fast_bfloat16()):
            return HostScan(num_buckets, torch.float32, room)(queries, memory, top_k)
        spare = min(top_k // SPARE, memory.max_fill - top_k)
        scan = HostScan(num_buckets, torch.bfloat16, room)
        slots, valid = scan(queries, memory, top_k + spare)
        counted = None if valid.all() else valid
        candidates = Rows(memory.keys, slots, counted, memory.key_scales)
        scores = dots(queries.float(), candidates)
        scores.masked_fill_(~valid, -torch.inf)
        order = scores.topk(top_k, dim=-1).indices
        return Neighbours(slots.gather(-1, order), valid.gather(-1, order))

    def _on_device(
        self, queries: Tensor, memory: Memory, top_k: int, num_buckets: int
    ) -> Neighbours:
        shape = (*queries.shape[:3], num_buckets)
        room = self.score_bytes or SCORE_BYTES
        best = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        bucket = torch.arange(num_buckets, device=queries.device)
        for rows, start, scores in score_blocks(queries, memory, room, num_buckets):
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
