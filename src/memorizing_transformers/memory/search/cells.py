"""Search of cells of keys that lie near each other: for large memories on a CPU, many queries each.

Keys are put into cells once they stay for a while. The ring is cut into ``SPANS`` spans of slots.
The cells of all spans but the one that is written now are kept until writing reaches the next span;
those of that span are made anew whenever something was written. So what is found depends on what
the memory holds and where it writes, and on nothing else: a resumed run repeats an unbroken one.

Shapes: B rows, G key/value heads, Q queries of a head group, M slots, K neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..derived import Derived
from ..view import MemoryView, Readable
from .bucketed import BucketedSearch
from .kernels.cell_scan import CELL, NO_SLOT, Cells
from .kernels.cpu_scan import SCORE_BYTES
from .protocol import Neighbours

SPANS = 8
LEAST_SLOTS = 16384
"""With fewer slots in use, to choose cells costs what it saves."""
LEAST_QUERIES = 512
"""For fewer queries a head, likewise: a cell would be scored for too few at once."""
LEAST_SCORES = 2**25
"""For fewer slots times queries of a head, likewise: to make cells costs what it saves."""
PROBES = 0.12
"""Cells a query in 1,024 cells, for each neighbour and each share of them that may be missed."""
GROWTH = 0.4
"""By which power of the number of cells that grows. Both measured on keys of trained models."""
KEYS_FIND = 0.75
"""Where keys, as queries, find less than this share of the target, they have too little structure
for cells. At a target of 0.95, 65,536 random keys find 0.35, those of trained models 0.85 or more.
"""


def cells_pay(slots: int, queries: int) -> bool:
    """Whether cells save more than they cost, for so many queries of a head."""
    many = slots >= LEAST_SLOTS and queries >= LEAST_QUERIES
    return many and slots * queries >= LEAST_SCORES


@dataclass
class _Head:
    """The cells of one row and head, and what they were made of."""

    document: int
    first: int
    """Of the slots of the span that was written then."""
    turn: int
    """How often the ring had been full."""
    settled: Cells
    """Of all other slots in use."""
    probes: dict[int, int | None] = field(default_factory=dict)
    """Cells a query, by number of neighbours; None for a scan."""
    end: int = -1
    """Pairs written when ``all`` was made."""
    all: Cells | None = None


class CellSearch:
    """Neighbours among the keys of the cells that look best to a query.

    Where cells do not pay (few slots or queries, dropped pairs, another device) it is a
    ``BucketedSearch``.

    Args:
        recall_target: expected share of the true neighbours, in (0, 1).
        score_bytes: bytes of scores that may live at once; None for what suits the device.
    """

    def __init__(self, recall_target: float = 0.95, score_bytes: int | None = None) -> None:
        self.recall_target = recall_target
        self.score_bytes = score_bytes or SCORE_BYTES
        self.otherwise = BucketedSearch(recall_target, score_bytes)
        self._heads: Derived[dict[tuple[int, int], _Head]] = Derived()

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        batch, groups, count, _ = queries.shape
        if queries.device.type != "cpu" or not cells_pay(memory.max_fill, count):
            return self.otherwise(queries, memory, top_k)
        slots = torch.empty(batch, groups, count, top_k, dtype=torch.int64)
        valid = torch.ones(slots.shape, dtype=torch.bool)
        # Tiles of queries have empty places.
        scratch = torch.empty(self.score_bytes // 4 * 5 // 4)
        state = torch.stack([memory.written - memory.origin, memory.fill, memory.document]).tolist()
        for row, (end, fill, document) in enumerate(zip(*state, strict=True)):
            heads: list[tuple[_Head, int]] = []
            if fill == min(end, memory.size) and cells_pay(fill, count):
                heads = self._heads_of(memory, row, end, document, top_k)
            if not heads:
                alone = MemoryView(memory.base, [memory.owner(row)])
                found = self.otherwise(queries[row : row + 1], alone, top_k)
                slots[row], valid[row] = found.slots[0], found.valid[0]
            for head, (made, probes) in enumerate(heads):
                cells = self._all_cells(made, memory, row, head, end)
                step = max(1, self.score_bytes // (4 * probes * CELL))
                for start in range(0, count, step):
                    part = slice(start, start + step)
                    own = queries[row, head, part].float()
                    slots[row, head, part] = cells.search(own, top_k, probes, scratch)
        valid &= slots != NO_SLOT
        return Neighbours(slots.clamp_(min=0), valid)

    def _heads_of(
        self, memory: Readable, row: int, end: int, document: int, top_k: int
    ) -> list[tuple[_Head, int]]:
        """What is settled of a row's heads, and the cells a query; nothing where a scan is due."""
        (first, stop), turn, span = self._written_now(memory.size, end)
        used = min(end, memory.size)
        if stop - first == used:
            return []
        of_memory = self._heads.setdefault(memory.base, {})
        heads: list[tuple[_Head, int]] = []
        for head in range(memory.keys.shape[1]):
            made = of_memory.get((memory.owner(row), head))
            if made is None or (made.document, made.first, made.turn) != (document, first, turn):
                others = torch.cat([torch.arange(first), torch.arange(stop, used)])
                keys = memory.keys_at((row, head, others))
                made = _Head(document, first, turn, Cells.of(keys, others, spare=span))
                of_memory[memory.owner(row), head] = made
            if top_k not in made.probes:
                made.probes[top_k] = self._probes(made.settled, top_k)
            probes = made.probes[top_k]
            if probes is None:
                return []
            heads.append((made, probes))
        return heads

    def _probes(self, cells: Cells, top_k: int) -> int | None:
        """Cells a query; None for a scan."""
        growth = (len(cells.slots) / 1024) ** GROWTH
        probes = math.ceil(PROBES * growth * top_k / (1 - self.recall_target))
        if 2 * probes > len(cells.slots):
            return None
        found = cells.recall_of_keys(top_k, probes, self.score_bytes)
        return probes if found >= KEYS_FIND * self.recall_target else None

    @staticmethod
    def _written_now(size: int, end: int) -> tuple[tuple[int, int], int, int]:
        """The slots from .. to of the span that is written, the ring's turn, a span's slots."""
        span = -(-size // (SPANS * CELL)) * CELL
        turn, place = divmod(end, size)
        first = place // span * span
        return (first, min(first + span, size if turn else end)), turn, span

    @staticmethod
    def _all_cells(made: _Head, memory: Readable, row: int, head: int, end: int) -> Cells:
        """The cells of all slots in use, of a row's head of which ``end`` pairs were written."""
        if made.end != end or made.all is None:
            (first, stop), *_ = CellSearch._written_now(memory.size, end)
            made.end, made.all = end, made.settled
            if first < stop:
                slots = torch.arange(first, stop)
                written = Cells.of(memory.keys_at((row, head, slots)), slots)
                made.all = made.settled.with_more(written)
        return made.all
