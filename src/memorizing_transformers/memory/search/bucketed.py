"""Approximate search in one pass: the best slot of each of L buckets, then the top-k of those.

Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s", 2022. A neighbour is lost when a
better one shares its bucket. Buckets are dealt like cards, slots of a bucket standing far apart, so
consecutive tokens, which resemble each other, never meet, nor those at the same place of segments
(``apart``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

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

logger = logging.getLogger(__name__)

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
CANDIDATE_BYTES = 12
"""A bucket's best score and its slot."""


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
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_tile"))


@cache
def has_fused_kernel() -> bool:
    """Whether this machine's GPU can run the Triton kernel (Ampere or later)."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class BucketedSearch:
    """Neighbours with an expected recall of ``recall_target``, exact where the memory is small.

    On a CPU more buckets cost little, so there are more than needed, until each has 32 slots; where
    it has instructions for them, rough scores in int8 choose the candidates. On a GPU scores and
    maxima are one Triton kernel where it can run, else plain torch.

    Args:
        recall_target: expected share of the true neighbours, in (0, 1).
        score_bytes: bytes of scores and candidates that may live at once; None for what suits the
            device.
    """

    def __init__(self, recall_target: float = 0.95, score_bytes: int | None = None) -> None:
        self.recall_target = recall_target
        self.score_bytes = score_bytes
        self.may_fuse = True

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
        return rescored(queries, memory, scan(queries, memory, top_k + spare), top_k)

    def _on_device(
        self, queries: Tensor, memory: Memory, top_k: int, num_buckets: int
    ) -> Neighbours:
        if self.may_fuse and self.recall_target <= ROUGH_RECALL and has_fused_kernel():
            from triton import TritonError

            from .fused import WIDEST

            if queries.shape[-1] <= WIDEST:
                try:
                    return self._fused(queries, memory, top_k, num_buckets)
                except TritonError as error:
                    self.may_fuse = False
                    logger.warning("bucketed search goes on in plain torch: %s", error)
        return self._plain(queries, memory, top_k, num_buckets)

    def _row_groups(self, queries: Tensor, num_buckets: int) -> Iterator[slice]:
        """Rows whose candidates may live at once."""
        batch, groups, count, _ = queries.shape
        room = self.score_bytes or SCORE_BYTES
        step = max(1, room // (groups * count * num_buckets * CANDIDATE_BYTES))
        for first in range(0, batch, step):
            yield slice(first, min(batch, first + step))

    def _fused(self, queries: Tensor, memory: Memory, top_k: int, num_buckets: int) -> Neighbours:
        from .fused import bucket_maxima

        spare = top_k // SPARE
        num_buckets = max(num_buckets, apart(top_k + spare))
        shape = (*queries.shape[:3], top_k + spare)
        slots = torch.empty(shape, dtype=torch.int64, device=queries.device)
        valid = torch.empty(shape, dtype=torch.bool, device=queries.device)
        for rows in self._row_groups(queries, num_buckets):
            scores, candidates = bucket_maxima(queries, memory, num_buckets, rows)
            top = scores.topk(top_k + spare, dim=-1)
            slots[rows] = candidates.gather(-1, top.indices)
            valid[rows] = top.values > -torch.inf
        return rescored(queries, memory, Neighbours(slots, valid), top_k)

    def _plain(self, queries: Tensor, memory: Memory, top_k: int, num_buckets: int) -> Neighbours:
        shape = (*queries.shape[:3], top_k)
        slots = torch.empty(shape, dtype=torch.int64, device=queries.device)
        valid = torch.empty(shape, dtype=torch.bool, device=queries.device)
        for rows in self._row_groups(queries, num_buckets):
            best, candidates = self._maxima(queries, memory, num_buckets, rows)
            top = best.topk(top_k, dim=-1)
            slots[rows] = candidates.gather(-1, top.indices)
            valid[rows] = top.values > -torch.inf
        return Neighbours(slots, valid)

    def _maxima(
        self, queries: Tensor, memory: Memory, num_buckets: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """What ``bucket_maxima`` returns, in plain torch and from factors in fp32."""
        shape = (*queries[rows].shape[:3], num_buckets)
        room = self.score_bytes or SCORE_BYTES
        best = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        bucket = torch.arange(num_buckets, device=queries.device)
        for part, start, scores in score_blocks(queries, memory, room, num_buckets, rows):
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


def rescored(queries: Tensor, memory: Memory, found: Neighbours, top_k: int) -> Neighbours:
    """The ``top_k`` best of candidates found by rough scores, by scores in fp32, best first."""
    slots, valid = found
    # Asking costs a wait on a GPU.
    counted = valid if queries.is_cuda or not valid.all() else None
    safe = slots if counted is None else slots.masked_fill(~valid, 0)
    scores = dots(queries.float(), Rows(memory.keys, safe, counted, memory.key_scales))
    order = scores.masked_fill_(~valid, -torch.inf).topk(top_k, dim=-1).indices
    return Neighbours(slots.gather(-1, order), valid.gather(-1, order))
