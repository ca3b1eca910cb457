"""One scan of a memory on a CPU, shared by the exact and the bucketed search.

For each row and head: scores of a chunk of queries against a span of slots, block by block, each
block's scores folded to the maxima of its buckets while they are still in the cache. Which members
of the best buckets to look at afterwards is the only difference of the two searches.

The members of a bucket are spread evenly over their block, at an odd distance in slots.

Shapes: n queries of one chunk, M slots of one head in use, D head width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...view import Readable
from ..protocol import Neighbours
from .top_k import MOST_MEMBERS, largest, largest_in_buckets, members_for

SCORE_BYTES = 32 * 2**20
"""Scores that live at once: what stays near a CPU's outer cache."""
BLOCK_SCORES = 2**19
"""Scores of a block: what stays in the inner caches between product and maximum."""
AT_ONCE = 2**20
"""Up to so many scores in a row, all its heads are searched at once."""
QUERIES_PER_THREAD = 128
"""Queries of a chunk: as many as keep the matrix product fast, for scores must stay in cache."""
STAGGER = 64
"""Unused scores between rows: with a power of two, all rows would use the same cache lines."""


def num_blocks(count: int, width: int) -> int:
    """Blocks that ``width`` slots are cut into for ``count`` queries."""
    return -(-count * width // BLOCK_SCORES)


def odd_stride(stride: int) -> int:
    """A distance of a bucket's members, at least ``stride``, that suits keys from a text.

    Tokens at the same place of different segments lack the same context, so their keys resemble
    each other: an odd number separates slots whose distance is a power of two.
    """
    return stride | 1


@dataclass
class HostScan:
    """How a memory is scanned.

    Args:
        buckets: buckets that a head's slots are split into, of which only the best member counts;
            or None for an exact search, which looks at every member of the best buckets.
        dtype: what scores are computed in.
        score_bytes: bytes of scores held at once, in addition to one head's keys in
            ``dtype``.
    """

    buckets: int | None
    dtype: torch.dtype
    score_bytes: int = SCORE_BYTES

    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        """Find ``top_k`` neighbours of queries (B, G, Q, D)."""
        batch, groups, count, _ = queries.shape
        shape = (batch, groups, count, top_k)
        slots = torch.zeros(shape, dtype=torch.int64)
        valid = torch.zeros(shape, dtype=torch.bool)
        room = self.score_bytes // 4
        chunk = max(1, min(count, QUERIES_PER_THREAD * torch.get_num_threads(), room))
        scratch = torch.empty(0, dtype=self.dtype)
        for row, (used, held) in enumerate(memory.retrievable()):
            if not used:
                continue
            found = min(top_k, used)
            valid[row, ..., :found] = True
            if self.buckets is None and groups * count * used <= min(AT_ONCE, room):
                # A copy of the keys without dropped ones would take longer than all the rest.
                stop = used if isinstance(held, slice) else int(held.max()) + 1
                keys = memory.keys_at((row, slice(None), slice(stop)))
                scores = queries[row].float() @ keys.mT
                if not isinstance(held, slice):
                    dropped = torch.ones(stop, dtype=torch.bool).index_fill_(0, held, False)
                    scores.masked_fill_(dropped, -torch.inf)
                slots[row, ..., :found] = largest(scores, found)[1]
                continue
            span = max(1, min(used, room // chunk))
            members = members_for(found)
            if self.buckets is not None:
                members = max(1, min(MOST_MEMBERS, used // self.buckets))
            # Strides are rounded up, and the last block of a span may be padded to a complete one.
            needed = chunk * (span + 2 * members * num_blocks(chunk, span) + STAGGER)
            if scratch.numel() < needed:
                scratch = torch.empty(needed, dtype=self.dtype)
            for head in range(groups):
                keys = memory.keys_at((row, head, held), self.dtype)
                for start in range(0, count, chunk):
                    part = slice(start, start + chunk)
                    own = queries[row, head, part].to(self.dtype)
                    chosen = self._search(own, keys.split(span), found, members, scratch)
                    chosen = chosen if isinstance(held, slice) else held[chosen]
                    slots[row, head, part, :found] = chosen
                del keys  # before the next head's are made
        return Neighbours(slots, valid)

    def _search(
        self,
        queries: Tensor,
        spans: Sequence[Tensor],
        top_k: int,
        members: int,
        scratch: Tensor,
    ) -> Tensor:
        """Slots (n, top_k) of the best keys, merged over spans, best first."""
        best: tuple[Tensor, Tensor] | None = None
        start = 0
        for keys in spans:
            values, slots = self._search_span(queries, keys, top_k, members, scratch)
            slots += start
            start += keys.shape[0]
            if best is not None:
                values = torch.cat([best[0], values], dim=-1)
                slots = torch.cat([best[1], slots], dim=-1)
                values, order = largest(values, min(top_k, values.shape[-1]))
                slots = slots.gather(-1, order)
            best = values, slots
        assert best is not None
        return best[1]

    def _search_span(
        self, queries: Tensor, keys: Tensor, top_k: int, members: int, scratch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and places (n, min(top_k, span)) of the best keys (span, D)."""
        count, width = queries.shape[0], keys.shape[0]
        stride = -(-width // (num_blocks(count, width) * members))
        if self.buckets is not None:
            stride = odd_stride(stride)
        block = stride * members
        blocks = -(-width // block)
        padded = blocks * block
        top_k = min(top_k, width)
        scores = scratch[: count * (padded + STAGGER)].view(count, -1)[:, :padded]
        maxima = torch.empty(count, blocks, stride, dtype=scores.dtype)
        scores[:, width:] = -torch.inf
        for index in range(blocks):
            part = slice(index * block, min(width, (index + 1) * block))
            torch.mm(queries, keys[part].T, out=scores[:, part])
            whole = scores[:, index * block : (index + 1) * block]
            torch.amax(whole.unflatten(1, (members, stride)), 1, out=maxima[:, index])
        flat = maxima.flatten(1)
        if flat.shape[1] < 2 * top_k:
            return largest(scores, top_k)
        values, first = largest(flat, top_k)
        if blocks > 1:
            firsts = torch.arange(blocks)[:, None] * block + torch.arange(stride)
            first = firsts.view(-1)[first]
        if self.buckets is None:
            return largest_in_buckets(scores, first, stride, members, top_k)
        steps = torch.arange(members) * stride
        candidates = first[:, None] + steps[:, None]
        won = scores.gather(1, candidates.flatten(1)).view_as(candidates) == values[:, None]
        return values, (won * candidates).amax(1)
