"""Tokens per second."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ...data.batch import Batch


class Throughput(Callback):
    """Logs counted training tokens per second over all ranks, without the time of validation.

    Attributes:
        tokens: tokens that all ranks have trained on in this run, exact at every measurement and at
            the end. In between, and in a checkpoint, the number is an estimate from this rank's own
            tokens, since the exact one needs a collective.
        seconds: duration of the training batches.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._own = 0
        self.seconds = 0.0
        self._window = (0, 0.0)
        self._batches = 0
        self._speed: float | None = None
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The counts at which a resumed run continues."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at saved counts."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self._window, self._own = (self.tokens, self.seconds), 0

    def _meet(self, trainer: Any) -> None:
        """Count the tokens of all ranks since the last measurement (a collective)."""
        if trainer.world_size > 1:
            own = torch.tensor(self._own, device=trainer.strategy.root_device)
            everybody = int(trainer.strategy.reduce(own, reduce_op="sum"))
            self.tokens += everybody - self._own * trainer.world_size
        self._own = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Stop the clock; measure again every ``trainer.log_every_n_steps`` batches."""
        self.seconds += time.perf_counter() - self._began
        counted = int(pl_module.on_host(batch).mask.sum())
        self._own += counted
        self.tokens += counted * trainer.world_size
        self._batches += 1
        if self._batches % max(1, trainer.log_every_n_steps) == 0:
            self._meet(trainer)
            tokens, seconds = self._window
            self._speed = (self.tokens - tokens) / (self.seconds - seconds)
            self._window = (self.tokens, self.seconds)
        if self._speed is not None:
            # Log at every batch: the loggers count batches themselves, over the end of an epoch.
            # A number would be copied to the GPU and back, and each copy would wait.
            speed = torch.tensor(self._speed)
            pl_module.log("throughput/tokens_per_second", speed, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the rest."""
        self._meet(trainer)
