"""The time of a step: search, model, data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from ...data.batch import Batch
from ...memory import Memory, Neighbours, Search
from .observer import log_scalars


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TimedSearch:
    """A search that sums the seconds it takes.

    Args:
        search: the search itself.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.seconds = 0.0

    @property
    def choice(self) -> Any:
        """What an automatic search chose; None for other searches."""
        return getattr(self.search, "choice", None)

    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        wait_for(queries.device)
        began = time.perf_counter()
        found = self.search(queries, memory, top_k)
        wait_for(queries.device)
        self.seconds += time.perf_counter() - began
        return found


class StepTiming(Callback):
    """Logs ``time/*``, in milliseconds per batch: search, model (everything else in the step, with
    the optimiser) and data (making the batch, if the loader counts it).

    Only measured steps wait for a GPU. They come one step after the steps that other callbacks
    observe, so that the time of these callbacks is not counted as the model's.

    Args:
        every_n_steps: Training steps between two measurements. 0 = never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._searches: dict[int, TimedSearch] = {}
        self._step = -1
        self._measuring = False
        self._began = 0.0
        self._waited = 0.0
        """Seconds that the loader had spent until the last batch."""
        self._data = 0.0

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self._step, self._measuring = -1, False
        self._waited = getattr(trainer.train_dataloader, "seconds", 0.0)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock, if this step is to be measured."""
        step, every = trainer.global_step, self.every_n_steps
        spent = getattr(trainer.train_dataloader, "seconds", 0.0)
        self._data, self._waited = spent - self._waited, spent
        wanted = every > 0 and step % every == 1 % every and step != self._step
        if not (wanted and trainer.loggers):
            return
        self._measuring, self._step = True, step
        for layer, reader in pl_module.net.readers().items():
            reader.search = self._searches[layer] = TimedSearch(reader.search)
        wait_for(pl_module.device)
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock and log."""
        if not self._measuring:
            return
        wait_for(pl_module.device)
        total = time.perf_counter() - self._began
        search = sum(timed.seconds for timed in self._searches.values())
        scalars = {"time/model_ms": 1000 * (total - search)}
        if pl_module.memory_layers:
            scalars["time/search_ms"] = 1000 * search
        if hasattr(trainer.train_dataloader, "seconds"):
            scalars["time/data_ms"] = 1000 * self._data
        self._restore(pl_module)
        log_scalars(trainer, scalars, self._step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the searches back."""
        self._restore(pl_module)

    def _restore(self, module: Any) -> None:
        for layer, timed in self._searches.items():
            module.net.readers()[layer].search = timed.search
        self._searches, self._measuring = {}, False
