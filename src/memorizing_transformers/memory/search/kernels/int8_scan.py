"""A rough scan of a memory in 8-bit integers, on a CPU, its candidates scored again in fp32.

A CPU multiplies bytes about four times as fast as fp32 numbers. Keys are taken less their mean,
which changes all scores of a query alike and leaves more of the 8 bits to the differences of keys.
Slots are split into small buckets of distant members, and every member of the best buckets is
scored again. So a neighbour is never lost to a better one in its bucket, only to the rounding.

Shapes: n queries of a chunk, M slots of one head in use, D head width, C candidates, K neighbours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gathered import Rows, dots
from ...view import Readable
from ..protocol import Neighbours
from .top_k import largest

QUERIES = 256
"""Queries of a chunk, at most."""
BLOCK = 4096
"""Slots of a block: its scores stay near the inner caches."""
MOST_BUCKETS = 16384
"""Buckets of a head, as long as they need no more than ``MOST_MEMBERS`` each."""
MOST_MEMBERS = 8
SPARE = 2
"""One spare bucket for every so many neighbours makes up for ranks that the rounding confuses."""
NARROW = 512
"""Up to this width numpy sorts rows of int32 many times as fast as wider ones."""
LARGEST_SCORE = 2**31 // NARROW - 1
"""Leaves room below a score for the position in a narrow row."""
NONE = -LARGEST_SCORE - 1
"""Below every score."""
SAMPLE = 4096
"""Keys that their mean and spread are taken from; the mean need not be exact."""
CLIP = 8.0
"""Root mean squares at which an entry of a key is cut, so that an outlier does not blur others."""


def has_fast_int8() -> bool:
    """Whether this CPU has instructions for products of bytes."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def _levels(width: int) -> int:
    """The largest integer that keeps sums of so many products in bounds."""
    return min(127, math.isqrt(LARGEST_SCORE // width))


def _in_bytes(x: Tensor, largest_entry: Tensor) -> Tensor:
    """Entries of x (..., D) as integer levels; the largest entry gets the largest level."""
    levels = _levels(x.shape[-1])
    scale = torch.where(largest_entry > 0, levels / largest_entry, 0.0)
    return (x * scale).round_().clamp_(-levels, levels).to(torch.int8)


def quantized_keys(keys: Tensor) -> Tensor:
    """Keys (M, D) fp32 less about their mean, as int8 of one scale for all."""
    sample = keys[:: -(-len(keys) // SAMPLE)]
    mean = sample.mean(0)
    rms = (sample - mean).square().mean().sqrt()
    bound = torch.maximum(keys.amax(0) - mean, mean - keys.amin(0)).amax()
    bound = torch.where(rms > 0, bound.minimum(CLIP * rms), bound)
    rough = torch.empty(keys.shape, dtype=torch.int8)
    for start in range(0, len(keys), BLOCK):
        rough[start : start + BLOCK] = _in_bytes(keys[start : start + BLOCK] - mean, bound)
    return rough


def quantized_queries(queries: Tensor) -> Tensor:
    """Queries (n, D) as int8, each of a scale of its own."""
    return _in_bytes(queries, queries.abs().amax(-1, keepdim=True))


def _filled_up(scores: Tensor, members: int) -> Tensor:
    """Scores (n, w) with a width that is a multiple of ``members``."""
    ragged = -scores.shape[1] % members
    return F.pad(scores, (0, ragged), value=NONE) if ragged else scores


def best_places(scores: Tensor, count: int) -> Tensor:
    """Positions (n, count) of the largest of int32 scores (n, w), in no order.

    A score leaves bits for the position, so one sort of plain numbers orders both. Wider rows are
    folded to maxima first.

    Args:
        scores: above ``NONE``, at most ``LARGEST_SCORE``.
        count: at most w.
    """
    members = min(8, NARROW // count)
    if scores.shape[1] <= NARROW:
        packed = scores * NARROW + torch.arange(scores.shape[1], dtype=scores.dtype)
        packed.numpy().sort(axis=-1)
        return (packed[:, -count:] & (NARROW - 1)).long()
    if members < 2:
        return scores.topk(count, dim=1).indices
    scores = _filled_up(scores, members)
    folded = scores.unflatten(1, (members, -1)).amax(1)
    steps = torch.arange(members) * folded.shape[1]
    places = (best_places(folded, count)[..., None] + steps).flatten(1)
    return places.gather(1, best_places(scores.gather(1, places), count))


class _Int8Keys:
    """The keys of one row and head, ready to be searched.

    Args:
        keys: (M, D) fp32.
        top_k: at most M.
    """

    def __init__(self, keys: Tensor, top_k: int) -> None:
        self.keys, self.top_k = keys, top_k
        self.rough = quantized_keys(keys)
        used = keys.shape[0]
        self.members = 1
        while self.members < MOST_MEMBERS and used > self.members * MOST_BUCKETS:
            self.members *= 2
        self.block = BLOCK if self.members > 1 else used
        self.whole = used // self.block * self.block
        ragged = -(-(used - self.whole) // self.members)
        self.buckets = self.whole // self.members + ragged
        self.strides = torch.full((-(-used // self.block),), self.block // self.members)
        if ragged:
            self.strides[-1] = ragged

    def maxima(self, queries: Tensor) -> Tensor:
        """Rough scores (n, buckets) of the best member of each bucket for queries (n, D)."""
        asked, count = quantized_queries(queries), queries.shape[0]
        if self.members == 1:
            return torch._int_mm(asked, self.rough.T)
        scores = torch.empty(count, self.block, dtype=torch.int32)
        maxima = torch.empty(count, self.buckets, dtype=torch.int32)
        per_block = self.block // self.members
        for block in range(self.whole // self.block):
            keys = self.rough[block * self.block : (block + 1) * self.block]
            torch._int_mm(asked, keys.T, out=scores)
            part = maxima[:, block * per_block : (block + 1) * per_block]
            torch.amax(scores.unflatten(1, (self.members, -1)), 1, out=part)
        if self.whole < len(self.rough):
            rest = _filled_up(torch._int_mm(asked, self.rough[self.whole :].T), self.members)
            part = maxima[:, self.whole // self.members :]
            torch.amax(rest.unflatten(1, (self.members, -1)), 1, out=part)
        return maxima

    def members_of(self, buckets: Tensor) -> Tensor:
        """Slots (n, C) of all members of some buckets; beyond M where a bucket has fewer."""
        block = buckets // (self.block // self.members)
        first = block * (self.block - self.block // self.members) + buckets
        steps = torch.arange(self.members) * self.strides[block][..., None]
        return (first[..., None] + steps).flatten(1)

    def __call__(self, queries: Tensor) -> Tensor:
        """Slots (n, K) of the best keys for queries (n, D) fp32, best first."""
        count = min(self.top_k + self.top_k // SPARE, self.buckets)
        slots = self.members_of(best_places(self.maxima(queries), count))
        real = slots < len(self.keys)
        counted = None if bool(real.all()) else real[None, None]
        safe = slots if counted is None else slots.clamp(max=len(self.keys) - 1)
        rows = Rows(self.keys[None, None], safe[None, None], counted)
        scores = dots(queries[None, None], rows)[0, 0]
        if counted is not None:
            scores.masked_fill_(~real, -torch.inf)
        return slots.gather(1, largest(scores, self.top_k)[1])


def quantized_search(queries: Tensor, memory: Readable, top_k: int, score_bytes: int) -> Neighbours:
    """Find ``top_k`` neighbours of queries (B, G, Q, D), nearly all of the true ones.

    Args:
        queries: (B, G, Q, D).
        memory: what is searched.
        top_k: neighbours a query.
        score_bytes: bytes of scores held at once, in addition to one head's keys in
            bytes.
    """
    batch, groups, count, _ = queries.shape
    slots = torch.zeros(batch, groups, count, top_k, dtype=torch.int64)
    valid = torch.zeros(slots.shape, dtype=torch.bool)
    for row, (used, held) in enumerate(memory.retrievable()):
        found = min(top_k, used)
        valid[row, ..., :found] = True
        for head in range(groups if used else 0):
            search = _Int8Keys(memory.keys_at((row, head, held)), found)
            chunk = max(1, min(QUERIES, score_bytes // (4 * (search.buckets + BLOCK))))
            for start in range(0, count, chunk):
                part = slice(start, start + chunk)
                chosen = search(queries[row, head, part].float())
                chosen = chosen if isinstance(held, slice) else held[chosen]
                slots[row, head, part, :found] = chosen
            del search  # before the next head's keys are made
    return Neighbours(slots, valid)
