"""Clearing the memory where a document begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ...data.batch import Batch
from ...errors import UserError


class MemoryClearing(Callback):
    """Empties, before each step, the memory and XL cache of the rows whose reset mask is set.

    Training keeps its bank over steps and epochs. Each pass over an evaluation split starts with a
    new bank and drops it at the end.
    """

    @staticmethod
    def require(callbacks: Iterable[Any]) -> None:
        """Refuse to run without this callback.

        Raises:
            UserError: if none of ``callbacks`` is one.
        """
        if not any(isinstance(callback, MemoryClearing) for callback in callbacks):
            raise UserError(
                "trainer.callbacks: MemoryClearing is missing, so a document would read the memory "
                "of the one before it; let MemorizingLM.configure_callbacks return it"
            )

    @staticmethod
    def _prepare(module: Any, stage: str, batch: Batch) -> None:
        module.prepare_bank(stage, batch)

    @staticmethod
    def _drop(module: Any, stage: str) -> None:
        module.banks.pop(stage, None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Clear the training rows that begin a document."""
        self._prepare(pl_module, "train", batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clear the validation rows that begin a document."""
        self._prepare(pl_module, "validate", batch)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clear the test rows that begin a document."""
        self._prepare(pl_module, "test", batch)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clear the rows of prediction that begin a document."""
        self._prepare(pl_module, "predict", batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a new bank, also after an interrupted sanity check."""
        self._drop(pl_module, "validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the bank."""
        self._drop(pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a new bank."""
        self._drop(pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the bank."""
        self._drop(pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a new bank."""
        self._drop(pl_module, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the bank."""
        self._drop(pl_module, "predict")
