"""Search of a memory whose first pairs are in an index, on disk or elsewhere; others are scanned.

The index gives candidates, which are scored again by the stored keys, so an index may compress its
own. To plug in another engine, write a ``PairIndex``.

Shapes: B rows, G key/value heads, Q queries of a head group, K neighbours, D head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..view import Readable
from .protocol import Neighbours

CHUNK = 2**22
"""Numbers of gathered keys or of scores that live at once."""


class PairIndex(Protocol):
    """Keys of the first pairs of one memory of one row, by head."""

    count: int
    """Pairs that it knows: those in slots 0 to count - 1."""

    def nearest(self, head: int, queries: NDArray[Any], number: int) -> NDArray[Any]:
        """Slots (n, number) int64 with large inner products, in any order; -1 for none.

        Args:
            head: key/value head.
            queries: (n, D) fp32.
            number: slots a query.
        """


class IndexedSearch:
    """Neighbours among the candidates of an index and among the pairs that it does not know.

    Args:
        index: of the first pairs, or None for a scan of all.
        candidates: slots that the index is asked for, for each neighbour.
    """

    def __init__(self, index: PairIndex | None, candidates: int = 16) -> None:
        self.index, self.candidates = index, candidates

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        batch, groups, count, _ = queries.shape
        slots = torch.zeros(batch, groups, count, top_k, dtype=torch.int64)
        valid = torch.zeros(slots.shape, dtype=torch.bool)
        used = memory.used.tolist()
        asked = queries.float().cpu()
        for row in range(batch):
            for head in range(groups):
                scores, places = self._of_head(
                    asked[row, head], memory, row, head, used[row], top_k
                )
                best = scores.topk(min(top_k, scores.shape[1]), dim=-1)
                found = best.indices.shape[1]
                slots[row, head, :, :found] = places.gather(1, best.indices)
                valid[row, head, :, :found] = best.values > -torch.inf
        return Neighbours(slots.to(queries.device), valid.to(queries.device))

    def _of_head(
        self, queries: Tensor, memory: Readable, row: int, head: int, used: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Scores and slots (n, C) of what may be among the best."""
        known = 0 if self.index is None else min(self.index.count, used)
        scores, places = [], []
        if known:
            assert self.index is not None
            number = min(self.candidates * top_k, known)
            found = self.index.nearest(head, np.ascontiguousarray(queries.numpy()), number)
            slots = torch.from_numpy(found)
            there = (slots >= 0) & (slots < used)
            step = max(1, CHUNK // (number * queries.shape[1]))
            parts = []
            for part, asked in zip(
                slots.clamp(min=0).split(step), queries.split(step), strict=True
            ):
                keys = memory.keys_at((row, head, part)).cpu()
                parts.append(torch.bmm(keys, asked[:, :, None]).squeeze(2))
            scores.append(torch.cat(parts).masked_fill(~there, -torch.inf))
            places.append(slots.clamp(min=0))
        if known < used:
            keys = memory.keys_at((row, head, slice(known, used))).cpu()
            step, kept = max(1, CHUNK // len(keys)), min(top_k, len(keys))
            best = [(asked @ keys.T).topk(kept) for asked in queries.split(step)]
            scores.append(torch.cat([one.values for one in best]))
            places.append(torch.cat([one.indices for one in best]) + known)
        if not scores:
            return queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0).long()
        return torch.cat(scores, 1), torch.cat(places, 1)
