"""Keep the training memory fresh: encode stored pairs again, or drop them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ...data.batch import Batch
from ...errors import ConfigError
from ...memory import drop_drifted, refresh
from ..sharded import is_sharded


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set every part to evaluation mode, and afterwards to the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class StalenessControl(Callback):
    """Refreshes or drops stale pairs of the training bank, as the keys of ``model.memory`` say.

    The module adds it if one of these keys is set. It acts before the first batch of an optimiser
    step, after the rows of new documents were cleared. Only the number of the step decides when, so
    that a resumed run does the same as an uninterrupted one. Evaluation has its own banks and
    constant weights, so nothing in them is stale.

    Args:
        check_every_n_steps: Training steps between two checks of ``drop_below_cosine``.
    """

    def __init__(self, check_every_n_steps: int = 8) -> None:
        self.check_every_n_steps = check_every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse keys that do not work with sharded weights.

        Raises:
            ConfigError: encoding is a collective there, but ranks hold different numbers of pairs.
        """
        module: Any = pl_module
        for key in ("refresh_every_n_steps", "drop_below_cosine"):
            value = getattr(module.config.memory, key)
            if value and is_sharded(module.net):
                remedy = "does not work with trainer.strategy=sharded; drop_after_n_steps does"
                raise ConfigError(f"model.memory.{key}", value, remedy)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh, or drop by age, or drop by drift."""
        module: Any = pl_module
        config, bank, step = module.config.memory, module.banks.get("train"), module.global_step
        every, oldest, least = (
            config.refresh_every_n_steps,
            config.drop_after_n_steps,
            config.drop_below_cosine,
        )
        if not (every or oldest or least) or bank is None:
            return
        if batch_idx % trainer.accumulate_grad_batches:
            return
        segment = batch.input_ids.shape[1]
        with evaluating(module.net), trainer.precision_plugin.forward_context():
            if every and step % every == 0:
                refresh(module.net.encode, bank, segment, step)
            if oldest:
                for memory in bank.memories.values():
                    memory.drop_written_before(step - oldest)
            if least and step % self.check_every_n_steps == 0:
                drop_drifted(module.net.encode, bank, segment, least)
