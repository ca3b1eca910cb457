"""What the host knows of a training step without waiting for a GPU: its batch, and later its loss.

To ask a GPU for one number, the host waits until all that was queued before is done, and meanwhile
queues nothing. So numbers of a batch come from the loader's own copy, and whether the loss is
finite is looked at where the host waits anyway: at steps that log, and before anything is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from ..data.batch import Batch
from ..errors import UserError
from .optimizers import OptimizerConfig


class LossWatch:
    """Keeps the last loss on its device, or the first one that is not finite."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._step: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Note a step's loss, a scalar; waits for nothing."""
        loss = loss.detach().float()
        number = torch.full_like(loss, step, dtype=torch.int64)
        if self._loss is None or self._step is None:
            self._loss, self._step = loss, number
            return
        fine = torch.isfinite(self._loss)
        self._loss = torch.where(fine, loss, self._loss)
        self._step = torch.where(fine, number, self._step)

    def bad(self) -> tuple[float, int] | None:
        """The first loss that was not finite and its step, if there was one; waits."""
        if self._loss is None or self._step is None or math.isfinite(loss := float(self._loss)):
            return None
        return loss, int(self._step)


class HostSide(LightningModule):
    """A module that keeps the loader's copy of a batch, and stops a run that has diverged."""

    optimizer_config: OptimizerConfig

    def __init__(self) -> None:
        super().__init__()
        self._copies: tuple[Any, Any] = (None, None)
        self._losses = LossWatch()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Copy a batch to the device, and keep it on the host too."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        self._copies = (moved, batch)
        return moved

    def on_host(self, batch: Batch) -> Batch:
        """The loader's own copy of the current batch; of any other batch, that batch."""
        moved, own = self._copies
        return own if moved is batch else batch

    def logs_now(self) -> bool:
        """Whether the current step logs, so that the host may wait."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.global_step + 1) % max(1, every) == 0

    def watch_loss(self, loss: Tensor) -> None:
        """Note a step's loss, before the backward pass.

        Raises:
            UserError: if it is not finite. On a GPU this is known at the next step that logs.
        """
        self._losses.note(loss, self.global_step)
        if loss.device.type == "cpu" or self.logs_now():
            self.check_losses()

    def check_losses(self, state: Mapping[str, Any] | None = None) -> None:
        """Refuse to go on after a loss that was not finite; waits.

        Args:
            state: weights that are about to be saved, by name.

        Raises:
            UserError: naming the step.
        """
        found = self._losses.bad()
        if found is not None:
            raise self._diverged(*found)
        names = [name for name, _ in self.named_parameters()] if state else []
        weights = [state[name] for name in names if name in state] if state else []
        # The last step may have spoilt what the next one would find out.
        if weights and not math.isfinite(nn.utils.get_total_norm(weights)):
            raise self._diverged(None, self.global_step)

    def _diverged(self, loss: float | None, step: int) -> UserError:
        in_half = any(weight.dtype == torch.float16 for weight in self.parameters())
        return self.optimizer_config.diverged(loss, step, in_half)

    def on_train_start(self) -> None:
        """Forget an earlier run."""
        self._losses = LossWatch()

    def on_train_end(self) -> None:
        """End no run as if it had not diverged."""
        self.check_losses()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save no weights of a run that has diverged."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_losses(checkpoint["state_dict"])

    def log_figures(self, metrics: MetricCollection, in_bar: tuple[str, ...]) -> None:
        """Log the values of metrics, with one wait for all; progress bars ask for them at each
        step, and would wait each time if they were on a GPU.

        Args:
            metrics: over the current step.
            in_bar: names that the progress bar shows.
        """
        values = metrics.compute()
        figures = torch.stack([*values.values()]).cpu()
        for name, value in zip(values, figures, strict=True):
            self.log(name, value, prog_bar=name in in_bar)
