"""Progress without a terminal: one line from time to time."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn

from ...errors import ConfigError
from ...pace import SECONDS, Pace, duration

FIGURES = (
    ("train/loss", "loss {:.4f}"),
    ("train/perplexity", "perplexity {:.2f}"),
    ("val/perplexity", "validation perplexity {:.2f}"),
    ("throughput/tokens_per_second", "{:,.0f} tokens/s"),
)
"""The logged values that a line shows, and their form."""


def planned_steps(trainer: Any) -> float:
    """Optimiser steps of a complete run; infinite if nothing bounds them."""
    epochs = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches = trainer.num_training_batches
        epochs = trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    return min(epochs, trainer.max_steps if trainer.max_steps >= 0 else math.inf)


class ProgressLines(ProgressBar):
    """Prints the progress of a run in plain lines: the first step, then one line at intervals.

    ``train.py`` adds it without a config where standard output is not a terminal, in place of
    Lightning's progress bar. It shows values that are logged anyway, so a line costs next to
    nothing. List it in the config to set its argument.

    Args:
        every_n_seconds: Least number of seconds between two lines about training, and between two
            lines about one evaluation.
    """

    def __init__(self, every_n_seconds: float = SECONDS) -> None:
        super().__init__()
        if not every_n_seconds > 0:
            raise ConfigError("every_n_seconds", every_n_seconds, "must be above 0")
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._steps = self._results = self._batches = Pace(every_n_seconds)
        self._began = (0, 0.0)
        """Step and time at which training began in this process."""
        self._batches_began = 0.0

    def disable(self) -> None:
        """Print nothing; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def _say(self, *parts: str) -> None:
        if self._enabled:
            print(", ".join(filter(None, parts)), flush=True)

    @staticmethod
    def _figures(trainer: Any) -> list[str]:
        logged = trainer.callback_metrics
        return [text.format(float(logged[name])) for name, text in FIGURES if name in logged]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._steps = Pace(self.every_n_seconds, at_once=True)
        self._results = Pace(self.every_n_seconds, at_once=True)
        self._began = (trainer.global_step, time.monotonic())

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step, if a line is due."""
        if self._enabled and self._steps.due():
            step, end = trainer.global_step, planned_steps(trainer)
            of = f"/{end:,.0f}" if math.isfinite(end) else ""
            self._say(f"step {step:,}{of}", *self._figures(trainer), self._left(trainer, end))

    def _left(self, trainer: Any, end: float) -> str:
        """The remaining time at the average speed so far."""
        step, began = self._began
        done = trainer.global_step - step
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
        estimates = [timer.time_remaining() for timer in timers]
        if done > 0 and math.isfinite(end):
            each = (time.monotonic() - began) / done
            estimates.append((end - trainer.global_step) * each)
        known = [estimate for estimate in estimates if estimate is not None]
        return f"{duration(max(0.0, min(known)))} left" if known else ""

    def _begin_batches(self) -> None:
        self._batches = Pace(self.every_n_seconds)
        self._batches_began = time.monotonic()

    def _say_batches(self, what: str, done: int, of: float) -> None:
        if self._enabled and self._batches.due():
            left = ""
            if math.isfinite(of):
                each = (time.monotonic() - self._batches_began) / done
                left = f"{duration((of - done) * each)} left"
            self._say(f"{what}: batch {done:,}" + (f"/{of:,.0f}" if left else ""), left)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._begin_batches()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._begin_batches()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._begin_batches()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print the batch, if a line is due."""
        if not trainer.sanity_checking:
            self._say_batches("validation", batch_idx + 1, trainer.num_val_batches[0])

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print the batch, if a line is due."""
        self._say_batches("test", batch_idx + 1, trainer.num_test_batches[0])

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print the batch, if a line is due."""
        self._say_batches("predict", batch_idx + 1, trainer.num_predict_batches[0])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the result of a validation within training, if a line is due."""
        found = trainer.callback_metrics.get("val/perplexity")
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or found is None or not self._enabled:
            return
        if self._results.due():
            loss = float(trainer.callback_metrics["val/loss"])
            step = f"validation at step {trainer.global_step:,}: loss {loss:.4f}"
            self._say(step, f"perplexity {float(found):.2f}")
