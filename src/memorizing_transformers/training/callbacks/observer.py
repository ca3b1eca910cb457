"""Callbacks that look between read and commit, while the slots still hold the retrieved pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from ...data.batch import Batch
from ...memory import MemoryBank
from ...model import ModelOutput


def log_scalars(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Give scalars to every logger, for the given step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def tensorboards(trainer: Trainer) -> list[Any]:
    """The TensorBoard writers of this process; only rank 0 with a TensorBoard logger has any."""
    if not trainer.is_global_zero:
        return []
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in found]


class WarnOnce:
    """Calls functions that draw; all their errors together become one warning.

    Args:
        what: what cannot be drawn, for the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._warned = False

    def __call__(self, draw: Callable[[], None]) -> None:
        """Call ``draw``; an error does not stop training."""
        try:
            draw()
        except Exception as error:
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"{self.what} could not be logged: {type(error).__name__}: {error}")


class Observer(Callback):
    """Observes training steps between read and commit; without a logger it does nothing.

    Args:
        every_n_steps: Training steps between two observations. 0 = never.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = -1
        """The last step that was observed."""
        self.trainer: Any = None
        self.module: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to observe."""
        self.trainer, self.module, self._step = trainer, pl_module, -1
        wanted = self.every_n_steps > 0 and trainer.loggers
        if wanted and self._look not in self.module.observers:
            self.module.observers.append(self._look)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop observing."""
        if self._look in self.module.observers:
            self.module.observers.remove(self._look)

    @torch.no_grad()
    def _look(self, batch: Batch, bank: MemoryBank, output: ModelOutput) -> None:
        step = self.module.global_step
        # With gradient accumulation a step has several batches; its first one is observed.
        if step % self.every_n_steps or step == self._step:
            return
        self._step = step
        self.observe(batch, bank, output, step)

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Look at a step and log what was seen; changes nothing."""
        raise NotImplementedError
