"""Search through faiss indexes on the host, first in, first out, for very large memories.

Each row and head owns a queue of sealed sub-indexes, each over a run of consecutive pairs, and the
newest pairs, which are scanned. A sub-index is dropped when all its pairs have left the ring. In
the oldest one, the pairs that left are masked by number. So no pair is ever removed from an index
(HNSW cannot do so, and IVF would read everything), and a reset drops a queue: O(1).

Indexes follow the ring by reading it: a search first seals what was written since the last one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..derived import Derived
from ..view import Readable
from .protocol import Neighbours

# Its type stubs know the C++ names only.
faiss: Any = _faiss

Kind = Literal["flat", "ivf", "hnsw"]

RUNS = 8
"""Sub-indexes of a full ring. The pairs not yet sealed, an eighth at most, are scanned."""
SHORTEST_RUN = 1024
"""A run of fewer pairs is not worth an index."""
HNSW_LINKS = 16
CALIBRATION_QUERIES = 64
"""Queries by which a sub-index learns how hard it must look."""


@dataclass
class SubIndex:
    """An index over pairs ``first`` to ``last`` (exclusive) of a row, numbered since its reset."""

    index: Any
    first: int
    last: int
    effort: int


class RingHead(NamedTuple):
    """The keys of one row and head; pair ``i`` since the row's reset lies in slot ``i % M``."""

    memory: Readable
    row: int
    head: int

    def keys(self, first: int, last: int) -> NDArray[Any]:
        """Keys (last - first, D) of consecutive pairs, in fp32 and in order."""
        size = self.memory.size
        start, stop = first % size, (last - 1) % size + 1
        spans = [(start, stop)] if start < stop else [(start, size), (0, stop)]
        parts = [
            self.memory.keys_at((self.row, self.head, slice(*span))).cpu().numpy() for span in spans
        ]
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


@dataclass
class Queue:
    """The sub-indexes of one row and head, oldest first."""

    document: int = -1
    sealed: deque[SubIndex] = field(default_factory=deque)
    asked: NDArray[Any] | None = None
    """A sample of the document's last queries; the present ones would tell of the future."""

    @property
    def last(self) -> int:
        """One past the youngest sealed pair."""
        return self.sealed[-1].last if self.sealed else 0


class FaissSearch:
    """Neighbours by faiss.

    Args:
        kind: flat (exact), ivf or hnsw.
        recall_target: share of the true neighbours, within each sub-index, that its effort
            (probes or beam width) is calibrated to on the document's queries so far.
    """

    def __init__(self, kind: Kind = "ivf", recall_target: float = 0.95) -> None:
        self.kind = kind
        self.recall_target = recall_target
        self._queues: Derived[list[list[Queue]]] = Derived()

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        batch, groups, count, _ = queries.shape
        shape = (batch, groups, count, top_k)
        slots, valid = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        asked = np.ascontiguousarray(queries.float().cpu().numpy())
        base = memory.base
        queues = self._queues.get(base)
        if queues is None:
            queues = [[Queue() for _ in range(groups)] for _ in range(base.keys.shape[0])]
            self._queues[base] = queues
        state = (memory.written - memory.origin, memory.fill, memory.document)
        for row, (used, fill, document) in enumerate(
            zip(*(x.tolist() for x in state), strict=True)
        ):
            for head in range(groups):
                if not fill:
                    continue
                queue = queues[memory.owner(row)][head]
                if queue.document != document:
                    queue.sealed.clear()
                    queue.document, queue.asked = document, None
                found = self._search_head(
                    asked[row, head], RingHead(memory, row, head), queue, used, used - fill, top_k
                )
                slots[row, head], valid[row, head] = np.maximum(found, 0) % memory.size, found >= 0
        device = queries.device
        return Neighbours(torch.from_numpy(slots).to(device), torch.from_numpy(valid).to(device))

    def _search_head(
        self,
        queries: NDArray[Any],
        ring: RingHead,
        queue: Queue,
        used: int,
        oldest: int,
        top_k: int,
    ) -> NDArray[Any]:
        """Numbers (n, top_k) of the best pairs, best first, -1 where there are no more.

        Args:
            queries: (n, D) fp32.
            ring: the keys.
            queue: what is sealed of them.
            used: pairs written, counted as the slots are.
            oldest: the first of them that can be retrieved.
            top_k: neighbours a query.
        """
        size = ring.memory.size
        while queue.sealed and queue.sealed[0].last <= oldest:
            queue.sealed.popleft()
        run = max(SHORTEST_RUN, size // RUNS)
        # Keys ask more easily than queries do: who knows none yet, as after a resume, scans once.
        while queue.asked is not None and used - max(queue.last, oldest) >= run:
            first = max(queue.last, oldest)
            keys = ring.keys(first, first + run)
            queue.sealed.append(self._seal(keys, first, queue.asked, top_k))
        if self.kind != "flat":
            queue.asked = _sample(queries)
        scores, numbers = [], []
        for part in queue.sealed:
            value, number = self._ask(part, queries, top_k, max(oldest, part.first))
            scores.append(value)
            numbers.append(np.where(number >= 0, number + part.first, -1))
        rest = max(queue.last, oldest)
        if rest < used:
            value, number = faiss.knn(
                queries, ring.keys(rest, used), top_k, metric=faiss.METRIC_INNER_PRODUCT
            )
            scores.append(value)
            numbers.append(np.where(number >= 0, number + rest, -1))
        score, number = np.concatenate(scores, 1), np.concatenate(numbers, 1)
        score = np.where(number >= 0, score, -np.inf)
        best = np.argsort(-score, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(number, best, 1)

    def _seal(self, keys: NDArray[Any], first: int, asked: NDArray[Any], top_k: int) -> SubIndex:
        """Index a run of keys (n, D) and calibrate it on queries (m, D)."""
        count, width = keys.shape
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        else:
            cells = max(1, int(4 * count**0.5))
            cells = min(cells, count // 16)
            quantizer = faiss.IndexFlatIP(width)
            index = faiss.IndexIVFFlat(quantizer, width, cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter = 6
            index.cp.min_points_per_centroid = 1
            index.cp.max_points_per_centroid = 64
            index.train(keys)
        index.add(keys)
        part = SubIndex(index, first, first + count, effort=top_k if self.kind == "hnsw" else 1)
        top_k = min(top_k, count)
        truth = faiss.knn(asked, keys, top_k, metric=faiss.METRIC_INNER_PRODUCT)[0][:, -1:]
        while part.effort < count:
            found = self._ask(part, asked, top_k, first)[0]
            if (found >= truth - 1e-5 * abs(truth)).mean() >= self.recall_target:
                break
            part.effort *= 2
        return part

    def _ask(
        self, part: SubIndex, queries: NDArray[Any], top_k: int, oldest: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scores and numbers within the sub-index of pairs from ``oldest`` on."""
        chosen = None
        if oldest > part.first:
            chosen = faiss.IDSelectorRange(oldest - part.first, part.last - part.first)
        if self.kind == "hnsw":
            settings = faiss.SearchParametersHNSW(sel=chosen, efSearch=part.effort)
        else:
            settings = faiss.SearchParametersIVF(sel=chosen, nprobe=part.effort)
        return part.index.search(queries, top_k, params=settings)


def _sample(vectors: NDArray[Any]) -> NDArray[Any]:
    """Some of the vectors (n, D), evenly spread."""
    spread = np.linspace(0, len(vectors) - 1, min(CALIBRATION_QUERIES, len(vectors)))
    return np.ascontiguousarray(vectors[spread.astype(int)])
