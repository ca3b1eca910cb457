"""Tokens per second."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ...data.batch import Batch


class Throughput(Callback):
    """Logs counted training tokens per second over all ranks, without the time of validation.

    Attributes:
        tokens: tokens that this process's ranks have trained on in this run.
        seconds: the time it took.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._window = (0, 0.0)
        self._began = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Stop the clock, log every ``trainer.log_every_n_steps`` steps."""
        self.seconds += time.perf_counter() - self._began
        self.tokens += int(batch.targets.numel()) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            tokens, seconds = self._window
            speed = (self.tokens - tokens) / (self.seconds - seconds)
            pl_module.log("throughput/tokens_per_second", speed, prog_bar=True)
            self._window = (self.tokens, self.seconds)
