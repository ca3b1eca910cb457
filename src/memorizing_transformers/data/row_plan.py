"""The row plan: which segment of which document each row reads at each step.

A document of L tokens has L - 1 predictions, read in ``ceil((L - 1) / N)`` segments of N inputs.
The segment at offset o has inputs ``tokens[o : o + N]`` and targets ``tokens[o + 1 : o + N + 1]``,
so a segment's first token is predicted by the end of the one before. A document stays in its row
from its first segment to its last, in consecutive steps.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

IDLE = -1


def drawn_order(count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation (count,) that depends on the seed alone, whatever the version of NumPy."""
    # Raw bits and a stable sort: NumPy promises to keep these, unlike `permutation`.
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


class RowPlan:
    """A pure function of its arguments: (epoch, step) → every row's document and offset.

    For training the rows read an endless stream: in each pass all documents once, in an order drawn
    from (seed, pass), each given to the row that is free earliest. No row ever idles; documents run
    on over the end of an epoch. For evaluation every document is read exactly once, the longest
    first to keep the rows even, and a row with nothing left idles.

    Answers do not depend on which were asked before: the plan is laid out as far as somebody asked
    and kept.

    Args:
        lengths: (D,) tokens of each document, at least 2.
        rows: B, over all ranks.
        segment_length: N, in tokens.
        seed: of the order of documents; not used in evaluation.
        train: whether the stream is endless.

    Raises:
        ValueError: no document, one shorter than 2 tokens, or a size below 1.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        rows: int,
        segment_length: int,
        seed: int = 0,
        train: bool = True,
    ) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 2:
            raise ValueError("a plan needs at least one document, each of at least 2 tokens")
        if rows < 1 or segment_length < 1 or seed < 0:
            raise ValueError(
                f"rows ({rows}) and segment_length ({segment_length}) must be at least 1, "
                f"seed ({seed}) at least 0"
            )
        self.rows = rows
        self.segment_length = segment_length
        self.seed = seed
        self.train = train
        self.predictions = int(sizes.sum()) - len(sizes)
        """Targets in one pass over all documents."""
        self.segments: NDArray[np.int64] = -(-(sizes - 1) // segment_length)
        """(D,) segments of each document."""
        self._order = self._documents()
        self._free = [(0, row) for row in range(rows)]
        """A heap of (first step without a document, row)."""
        self._starts = [array("q") for _ in range(rows)]
        self._read = [array("q") for _ in range(rows)]
        """Per row, its documents so far and the steps at which they begin."""
        if not train:
            self._extend(int(self.segments.sum()))
        self.steps_per_epoch = (
            -(-int(self.segments.sum()) // rows) if train else max(step for step, _ in self._free)
        )
        """Steps in which training reads about one pass, or evaluation everything."""

    def locate(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What all rows read at a step.

        Args:
            epoch: from 0; evaluation reads the same in each.
            step: from 0, within the epoch.

        Returns:
            documents (B,) and offsets in tokens (B,), int64; -1 and 0 for an idle row.

        Raises:
            ValueError: epoch or step is negative.
        """
        if epoch < 0 or step < 0:
            raise ValueError(f"epoch ({epoch}) and step ({step}) must be at least 0")
        if self.train:
            step += epoch * self.steps_per_epoch
            self._extend(step)
        documents = np.full(self.rows, IDLE, dtype=np.int64)
        offsets = np.zeros(self.rows, dtype=np.int64)
        for row, starts in enumerate(self._starts):
            index = bisect_right(starts, step) - 1
            if index < 0:
                continue
            document, segment = self._read[row][index], step - starts[index]
            if segment < self.segments[document]:
                documents[row] = document
                offsets[row] = segment * self.segment_length
        return documents, offsets

    @property
    def padding_share(self) -> float:
        """The share of token places that hold no prediction.

        In training these are the ends of documents' last segments, in evaluation the idle rows too.
        """
        segments = int(self.segments.sum()) if self.train else self.rows * self.steps_per_epoch
        return 1 - self.predictions / (segments * self.segment_length)

    def describe(self) -> str:
        """A line for the user: steps, rows and padding, and fewer rows if they would do as well."""
        line = (
            f"{self.steps_per_epoch:,} steps of {self.rows} rows of {self.segment_length} tokens, "
            f"{self.padding_share:.1%} padding"
        )
        busy = -(-int(self.segments.sum()) // self.steps_per_epoch)
        if busy <= self.rows // 2:
            line += f"; data.eval_rows = {busy} would take about as many steps"
        return line

    def _extend(self, step: int) -> None:
        """Give documents to rows until none is free at this step, or none is left."""
        while self._free[0][0] <= step:
            document = next(self._order, None)
            if document is None:
                return
            start, row = self._free[0]
            self._starts[row].append(start)
            self._read[row].append(document)
            heapq.heapreplace(self._free, (start + int(self.segments[document]), row))

    def _documents(self) -> Iterator[int]:
        if not self.train:
            yield from np.argsort(-self.segments, kind="stable").tolist()
            return
        number = 0
        while True:
            yield from drawn_order(len(self.segments), (self.seed, number)).tolist()
            number += 1
