"""Test-time training: weights that continue to learn while they read a document.

After each segment, one step of gradient descent on its loss, so later segments profit from it. Each
document starts with the trained weights. Known as dynamic evaluation (Mikolov et al., 2010; Krause
et al., 2018). It remembers in weights what a memory keeps as pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from memorizing_transformers.data.batch import Batch
from memorizing_transformers.errors import ConfigError


class TestTimeTraining(Callback):
    """Trains on each segment after its loss was measured, in ``test`` and ``predict``.

    Each document starts with the trained weights, and they come back at the end. Needs
    ``data.eval_rows=1``, because the rows of a batch share their weights, and
    ``trainer.inference_mode=false``, because it needs gradients. With a memory, stored pairs stay
    as they are while the weights change.

    Args:
        lr: Step size of gradient descent on the mean loss of a segment's tokens.
    """

    __test__ = False  # pytest would collect it for its name

    def __init__(self, lr: float = 0.1) -> None:
        if not 0 <= lr < math.inf:
            raise ConfigError("TestTimeTraining.lr", lr, "must be a number of at least 0")
        self.lr = lr
        self._trained: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def _restore(self, module: Any) -> None:
        for name, tensor in self._trained.items():
            module.net.get_parameter(name).copy_(tensor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, in a fit too: its final table is a test of the same trainer.

        Raises:
            ConfigError: naming the key and what would do.
        """
        loops: Any = trainer
        if stage == "validate":
            return
        loop = loops.predict_loop if stage == "predict" else loops.test_loop
        if loop.inference_mode:
            remedy = "must be false to train while reading"
            if stage == "fit":
                remedy += "; or leave TestTimeTraining out of the fit"
            raise ConfigError("trainer.inference_mode", True, remedy)
        rows = getattr(loops.datamodule, "eval_rows", None)
        # Those of all processes; each has weights of its own.
        if rows is not None and rows > trainer.world_size:
            remedy = f"must be {trainer.world_size}: rows would share their weights"
            raise ConfigError("data.eval_rows", rows, remedy)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *_: Any, **__: Any
    ) -> None:
        """Restore the weights where a document begins; find the gradient before the commit."""
        module: Any = pl_module
        rows = batch.input_ids.shape[0]
        if rows != 1:
            raise ConfigError("data.eval_rows", rows, "must be 1: rows would share their weights")
        stage = "test" if trainer.testing else "predict"
        module.prepare_bank(stage, batch)
        if not self._trained:
            # Not at the start: the module takes the weights of ``init_from`` after that hook.
            named = module.net.named_parameters()
            self._trained = {name: x.detach().clone() for name, x in named if x.requires_grad}
        if batch.reset.any():
            self._restore(module)
        learning = [module.net.get_parameter(name) for name in self._trained]
        with torch.enable_grad(), trainer.precision_plugin.forward_context():
            _, losses = module.read(stage, batch)
            loss = losses.sum() / batch.mask.sum().clamp(min=1)
            found = torch.autograd.grad(loss, learning, allow_unused=True)
        self._gradients = dict(zip(self._trained, found, strict=True))

    @torch.no_grad()
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Learn from the segment, after its loss was measured."""
        module: Any = pl_module
        for name, gradient in self._gradients.items():
            if gradient is not None:
                module.net.get_parameter(name).sub_(gradient, alpha=self.lr)
        self._gradients = {}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Give the trained weights back."""
        self._restore(pl_module)
        self._trained, self._gradients = {}, {}

    on_predict_batch_start = on_test_batch_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_exception = on_test_end
