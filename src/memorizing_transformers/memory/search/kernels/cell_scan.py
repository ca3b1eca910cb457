"""A scan of those cells of a memory that look best to a query, on a CPU.

A cell holds ``CELL`` keys that lie near each other (``tree.py``). It looks as good to a query as
the better of its halves: the score of the half's mean, and ``REACH`` standard deviations of its
keys along the query. The keys of the chosen cells are scored in fp32. Pairs of a query and a cell
are put in the order of their cells, so that scores stay products of matrices.

Shapes: n queries of a chunk, P cells, L keys of a cell, D head width, C chosen cells, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .top_k import largest
from .tree import leaves

CELL = 64
HALVES = 2
REACH = 2.0
FOLD = 8
"""Members of a bucket within a cell: what is sorted are the buckets' best."""
TILE = 64
"""Queries of a tile at most: a product of matrices of one cell."""
TILES = 128
"""Tiles at once: what stays in the inner caches."""
NO_SLOT = -1
SAMPLE = 64
"""Keys that cells are tried by."""


@dataclass
class Cells:
    """Keys of one row and head, cell by cell.

    Args:
        slots: (P, L) int64, where a key is stored; ``NO_SLOT`` where a cell has fewer keys.
        keys: (P', L, D) fp32; the first P count.
        halves: (D + 1, 2 P) mean of each half of a cell, and its keys' standard deviation in one
            direction.
        short: (S,) int64 the cells that have fewer keys.
    """

    slots: Tensor
    keys: Tensor
    halves: Tensor
    short: Tensor

    @classmethod
    def of(cls, keys: Tensor, slots: Tensor, spare: int = 0) -> Cells:
        """The cells of keys.

        Args:
            keys: (M, D) fp32, M > 0.
            slots: (M,) where they are stored.
            spare: keys that ``with_more`` shall have room for.
        """
        count, width = keys.shape
        missing = -count % CELL
        if missing:
            # Less than a cell of them: so every cell has a key.
            keys = torch.cat([keys, keys.mean(0).expand(missing, -1)])
            slots = torch.cat([slots, slots.new_full((missing,), NO_SLOT)])
        order = leaves(keys, CELL)
        room = torch.empty(len(keys) + -(-spare // CELL) * CELL, width)
        chosen = torch.index_select(keys, 0, order.flatten(), out=room[: len(keys)])
        cells, placed = room.view(-1, CELL, width), slots[order]
        short = (placed == NO_SLOT).any(1).nonzero().flatten()
        halves = _halves(chosen.view(-1, CELL // HALVES, width))
        for cell in short.tolist():
            there = (placed[cell] != NO_SLOT).view(HALVES, -1)
            parts = cells[cell].view(*there.shape, width)
            for half, own in enumerate(there):
                # A half without a key looks like the other one.
                counted = parts[half, own] if own.any() else parts[there]
                halves[:, cell * HALVES + half] = _halves(counted[None])[:, 0]
        return cls(placed, cells, halves, short)

    def with_more(self, more: Cells) -> Cells:
        """These cells and others, which replace those of an earlier call."""
        count = len(self.slots)
        self.keys[count : count + len(more.slots)] = more.keys[: len(more.slots)]
        halves = torch.cat([self.halves, more.halves], 1)
        short = torch.cat([self.short, more.short + count])
        return Cells(torch.cat([self.slots, more.slots]), self.keys, halves, short)

    def search(
        self, queries: Tensor, top_k: int, probes: int, scratch: Tensor | None = None
    ) -> Tensor:
        """Slots (n, top_k) of the best keys of the chosen cells, best first.

        Where the chosen cells have fewer keys, ``NO_SLOT`` follows.

        Args:
            queries: (n, D) fp32.
            top_k: at most the places that ``probes`` cells have.
            probes: cells a query, at most P.
            scratch: numbers to write scores over, where there is room for all; memory that is new
                costs a part of the time.
        """
        pairs = _Pairs.of(self._best_cells(queries, probes), len(self.slots))
        scores = self._scores(queries, pairs, scratch)
        return self._best_slots(scores, pairs, top_k)

    def recall_of_keys(self, top_k: int, probes: int, score_bytes: int) -> float:
        """Share of their true neighbours that some of the keys find, as queries.

        Args:
            top_k: neighbours.
            probes: cells a query.
            score_bytes: bytes of scores that may live at once.
        """
        flat, slots = self.keys[: len(self.slots)].flatten(0, 1), self.slots.flatten()
        stored = (slots != NO_SLOT).nonzero().flatten()
        asked = flat[stored[:: -(-len(stored) // SAMPLE)]]
        places = torch.zeros(int(slots.max()) + 1, dtype=torch.int64)
        places[slots[stored]] = stored
        found = 0
        for part in asked.split(max(1, score_bytes // (4 * len(flat)))):
            scores = (part @ flat.T).masked_fill_(slots == NO_SLOT, -torch.inf)
            worst = scores.topk(top_k, 1).values[:, -1:] - 1e-5 * part.norm(dim=1, keepdim=True)
            chosen = self.search(part, top_k, probes)
            own = scores.gather(1, places[chosen.clamp(min=0)])
            own.masked_fill_(chosen == NO_SLOT, -torch.inf)
            found += int((own >= worst).sum())
        return found / (len(asked) * top_k)

    def _best_cells(self, queries: Tensor, probes: int) -> Tensor:
        """(n, C) cells that look best, in any order."""
        length = REACH * queries.norm(dim=1, keepdim=True)
        looks = torch.cat([queries, length], 1) @ self.halves
        looks = looks.view(len(queries), -1, HALVES).amax(2)
        return looks.topk(probes, dim=1, sorted=False).indices

    def _scores(self, queries: Tensor, pairs: _Pairs, scratch: Tensor | None) -> Tensor:
        """Scores (tiles * T, L) of the queries of each place with the keys of its cell."""
        places, width = pairs.queries.view(len(pairs.cells), -1), queries.shape[1]
        needed = places.numel() * CELL
        if scratch is None or scratch.numel() < needed:
            scratch = torch.empty(needed)
        scores = scratch[:needed].view(*places.shape, CELL)
        for start in range(0, len(places), TILES):
            part = slice(start, start + TILES)
            asked = queries.index_select(0, places[part].flatten()).view(*places[part].shape, width)
            keys = self.keys.index_select(0, pairs.cells[part])
            torch.bmm(asked, keys.mT, out=scores[part])
        # Here, before any maximum: a bucket must not be chosen for a place without a key.
        tiles = torch.isin(pairs.cells, self.short).nonzero().flatten()
        if len(tiles):
            empty = self.slots[pairs.cells[tiles], None] == NO_SLOT
            scores[tiles] = scores[tiles].masked_fill_(empty, -torch.inf)
        return scores.view(-1, CELL)

    def _best_slots(self, scores: Tensor, pairs: _Pairs, top_k: int) -> Tensor:
        count = len(pairs.places)
        maxima = scores.view(-1, FOLD, CELL // FOLD).amax(1)
        maxima = maxima.index_select(0, pairs.places.flatten()).view(count, -1)
        _, bucket = largest(maxima, min(top_k, maxima.shape[1]))
        per_cell = CELL // FOLD
        chosen = torch.div(bucket, per_cell, rounding_mode="floor")
        row = pairs.places.gather(1, chosen)[..., None]
        member = (bucket % per_cell)[..., None] + torch.arange(FOLD) * per_cell
        cell = pairs.chosen.gather(1, chosen)[..., None]
        slots = self.slots.view(-1)[(cell * CELL + member).flatten(1)]
        found = scores.view(-1)[(row * CELL + member).flatten(1)]
        return slots.gather(1, largest(found, top_k)[1])


def _halves(keys: Tensor) -> Tensor:
    """Mean and standard deviation (D + 1, n) of halves' keys (n, l, D)."""
    spread, mean = torch.var_mean(keys, 1, correction=0)
    return torch.cat([mean, spread.mean(1, keepdim=True).sqrt()], 1).T.contiguous()


@dataclass
class _Pairs:
    """Pairs of a query and a chosen cell, in tiles of T queries of one cell.

    Args:
        chosen: (n, C) the cells of each query.
        places: (n, C) the place of a pair, tile * T + position in it.
        queries: (tiles * T,) the query at each place; 0 where none is.
        cells: (tiles,) the cell of each tile.
    """

    chosen: Tensor
    places: Tensor
    queries: Tensor
    cells: Tensor

    @classmethod
    def of(cls, chosen: Tensor, cells: int) -> _Pairs:
        """Pairs of chosen cells (n, C), of so many in all."""
        flat = chosen.flatten()
        size = TILE
        while size > 8 and size * 4 * cells > len(flat):
            size //= 2
        # numpy sorts 16-bit numbers by their digits, in linear time.
        numbers = flat.numpy().astype(np.uint16 if cells <= 2**16 else np.uint32)
        order = torch.from_numpy(np.argsort(numbers, kind="stable"))
        counts = torch.bincount(flat, minlength=cells)
        tiles = (counts + size - 1) // size
        shift = (tiles.cumsum(0) - tiles) * size - (counts.cumsum(0) - counts)
        to = shift.repeat_interleave(counts) + torch.arange(len(flat))
        places = torch.empty_like(flat)
        places[order] = to
        queries = flat.new_zeros(int(tiles.sum()) * size)
        queries[to] = torch.div(order, chosen.shape[1], rounding_mode="floor")
        return cls(
            chosen, places.view_as(chosen), queries, torch.arange(cells).repeat_interleave(tiles)
        )
