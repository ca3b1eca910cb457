"""From the plan to batches, for the rows of one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np
import torch

from .ahead import one_ahead
from .batch import IGNORE_INDEX, Batch
from .row_plan import IDLE, RowPlan
from .tokens.store import TokenStore


class SegmentLoader:
    """Yields one `Batch` per step; not a `DataLoader`, so that Lightning leaves it as it is.

    Rank r of W reads the rows from ``r * B / W`` up to ``(r + 1) * B / W`` of the plan's B. Every
    rank has the same number of steps.

    The training loader is an endless stream read in epochs: an iteration resumes where the one
    before stopped, even if it was left early, since the rows' memories hold what was read until
    there. The evaluation loader starts again with each iteration.

    Args:
        store: the documents.
        plan: laid out over the store's lengths.
        rank: of this process.
        world_size: number of processes.
        steps: batches of one iteration, where Lightning is to stop before the length of the loader;
            default: the plan's steps per epoch.
        repeat: start every training iteration with the same first batch, to overfit on a few.
        gpu: where the batches go, if that is a GPU: then they are pinned, and made one ahead. The
            position counts those that were handed out.

    Raises:
        ValueError: where the rows cannot be split evenly over the ranks.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: RowPlan,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
        repeat: bool = False,
        gpu: torch.device | None = None,
    ) -> None:
        if plan.rows % world_size or not 0 <= rank < world_size:
            raise ValueError(f"{plan.rows} rows, rank {rank} of {world_size}")
        share = plan.rows // world_size
        self.store = store
        self.plan = plan
        self.rows = slice(rank * share, (rank + 1) * share)
        self.steps = plan.steps_per_epoch if steps is None else steps
        self.repeat = repeat
        self.gpu = gpu
        self._delivered = 0
        """Batches handed out since the stream began."""
        self._loaded = False
        self.seconds = 0.0
        """Time that those who asked for batches have waited."""

    def __len__(self) -> int:
        """Steps of the plan's epoch, before any limit of the trainer's."""
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # A generator: an iterator that is made and dropped, as Lightning does, moves nothing.
        if (self.repeat or not self.plan.train) and not self._loaded:
            self._delivered = 0
        left = self.steps
        if self._loaded and self.steps:
            left -= self._delivered % self.steps
        self._loaded = False
        numbers = range(self._delivered, self._delivered + left)
        makes = (partial(self.batch, *divmod(n, self.plan.steps_per_epoch)) for n in numbers)
        ready = (make() for make in makes) if self.gpu is None else one_ahead(makes, self.gpu)
        with closing(ready):
            for number in numbers:
                # Counted before it is handed out: a checkpoint with this batch asks for the next.
                self._delivered = number + 1
                began = time.perf_counter()
                batch = next(ready)
                self.seconds += time.perf_counter() - began
                yield batch

    @property
    def epoch(self) -> int:
        """The epoch of the plan that the next batch belongs to."""
        return self._delivered // self.plan.steps_per_epoch

    @property
    def step(self) -> int:
        """The step of the next batch within its epoch."""
        return self._delivered % self.plan.steps_per_epoch

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch; the same on every rank."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start at a position and run to the end of its epoch."""
        self._delivered = state["epoch"] * self.plan.steps_per_epoch + state["step"]
        self._loaded = True

    def follow(self, other: SegmentLoader) -> None:
        """Let the next iteration start where that of another loader of the stream would."""
        self._delivered, self._loaded = other._delivered, other._loaded

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch at a position, without moving there."""
        documents, offsets = self.plan.locate(epoch, step)
        documents, offsets = documents[self.rows], offsets[self.rows]
        shape = (len(documents), self.plan.segment_length)
        input_ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        text_bytes = np.zeros(len(documents), dtype=np.int64)
        text_tokens = np.ones(len(documents), dtype=np.int64)
        for row, (document, offset) in enumerate(zip(documents, offsets, strict=True)):
            if document == IDLE:
                continue
            piece = self.store.read(document, offset, offset + self.plan.segment_length + 1)
            counted = len(piece) - 1
            input_ids[row, :counted] = piece[:-1]
            targets[row, :counted] = piece[1:]
            text_bytes[row] = self.store.num_bytes[document]
            text_tokens[row] = self.store.lengths[document]
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            targets=torch.from_numpy(targets),
            reset=torch.from_numpy(offsets == 0),
            document=torch.from_numpy(documents),
            position=torch.from_numpy(offsets),
            text_bytes=torch.from_numpy(text_bytes),
            text_tokens=torch.from_numpy(text_tokens),
        )
