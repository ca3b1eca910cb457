"""Test-time training: weights that go on learning while they read a document.

After each segment one step of gradient descent on its loss, so later segments profit from it; each
document starts from the trained weights. Known as dynamic evaluation (Mikolov et al., 2010; Krause
et al., 2018). It remembers in weights what a memory keeps as pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from memorizing_transformers.data.batch import Batch
from memorizing_transformers.errors import ConfigError


class TestTimeTraining(Callback):
    """Trains on each test segment after its loss was measured; every document starts afresh.

    Acts in ``test`` and ``predict`` and needs ``data.eval_rows=1``, because the rows of a batch
    share their weights, and ``trainer.inference_mode=false``, because it needs gradients. Together
    with a memory the weights change under the stored pairs.

    Args:
        lr: Step size of gradient descent on the mean loss of a segment's tokens.
    """

    __test__ = False  # not a test, whatever its name

    def __init__(self, lr: float = 0.1) -> None:
        if not lr >= 0:
            raise ConfigError("TestTimeTraining.lr", lr, "must be at least 0")
        self.lr = lr
        self._start: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor | None] = {}

    def _begin(self, trainer: Trainer) -> None:
        loops: Any = trainer
        loop = loops.test_loop if trainer.testing else loops.predict_loop
        if loop.inference_mode:
            raise ConfigError(
                "trainer.inference_mode", True, "must be false to train while reading"
            )
        self._start = {}

    @torch.no_grad()
    def _restore(self, module: Any) -> None:
        for name, parameter in module.net.named_parameters():
            parameter.copy_(self._start[name])

    def _differentiate(self, module: Any, stage: str, batch: Batch) -> None:
        if batch.input_ids.shape[0] != 1:
            rows = batch.input_ids.shape[0]
            raise ConfigError("data.eval_rows", rows, "must be 1: rows would share their weights")
        module.prepare_bank(stage, batch)
        if not self._start:
            self._start = {name: x.detach().clone() for name, x in module.net.named_parameters()}
        if batch.reset.any():
            self._restore(module)
        trained = {n: p for n, p in module.net.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            _, losses = module.read(stage, batch)
            loss = losses.sum() / batch.mask.sum().clamp(min=1)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        self._gradients = dict(zip(trained, found, strict=True))

    @torch.no_grad()
    def _descend(self, module: Any) -> None:
        for name, parameter in module.net.named_parameters():
            gradient = self._gradients.get(name)
            if gradient is not None:
                parameter.sub_(gradient, alpha=self.lr)
        self._gradients = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to start without gradients."""
        self._begin(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to start without gradients."""
        self._begin(trainer)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Restore the weights where a document begins; find the gradient before the commit."""
        self._differentiate(pl_module, "test", batch)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Restore the weights where a document begins; find the gradient before the commit."""
        self._differentiate(pl_module, "predict", batch)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Learn from the segment, after its loss was measured."""
        self._descend(pl_module)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Learn from the segment, after its loss was measured."""
        self._descend(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the trained weights back."""
        self._restore(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the trained weights back."""
        self._restore(pl_module)
