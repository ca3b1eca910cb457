"""What logging costs a training step: the same run with it and without it, taking turns.

    python benchmarks/logging_cost.py --config configs/quickstart.yaml

Logging at its defaults is rare, so its cost drowns in the noise of the steps between. The runs with
logging therefore log ``--more`` times as often, and their extra time is divided by as much.
Validation is left out of the steps; what its figure costs is measured separately.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from statistics import median
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import circumstances

from memorizing_transformers.training.callbacks import LossByPosition, StalenessLogging
from memorizing_transformers.training.cli import MemoryCLI
from memorizing_transformers.training.tensorboard import RunLogger
from memorizing_transformers.training.unwanted_messages import drop_unwanted_messages


class Clock(Callback):
    """Wall time from the first counted step to the end."""

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Start after the warm-up."""
        if batch_idx == self.skipped:
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


def build(args: argparse.Namespace, folder: str, more: float) -> tuple[MemoryCLI, Clock]:
    """A run that logs ``more`` times as often as by default, or with 0 not at all."""
    steps = args.steps + args.warm_up
    options = {
        "max_steps": steps,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    given = [f"--trainer.{key}={value}" for key, value in options.items()]
    cli = MemoryCLI(run=False, args=["--config", args.config, *given])
    trainer, clock = cli.trainer, Clock(args.warm_up)
    trainer.loggers = [RunLogger(folder)] if more else []

    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]
    trainer.callbacks.append(StalenessLogging())
    for callback in trainer.callbacks:
        every = getattr(callback, "every_n_steps", None)
        if every is not None:
            callback.every_n_steps = max(1, round(every / more)) if more else 0
    trainer.log_every_n_steps = max(1, round(trainer.log_every_n_steps / more)) if more else 0
    trainer.callbacks.append(clock)
    return cli, clock


def one_run(args: argparse.Namespace, more: float) -> tuple[float, MemoryCLI]:
    """Seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        cli, clock = build(args, folder, more)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return clock.seconds / args.steps, cli


def validation(cli: MemoryCLI, tokens: int) -> float:
    """Seconds of one validation, drawing the figure of so many tokens."""
    trainer, begun = cli.trainer, time.perf_counter()
    (figure,) = (c for c in trainer.callbacks if isinstance(c, LossByPosition))
    figure.tokens = tokens
    with tempfile.TemporaryDirectory() as folder:
        trainer.loggers = [RunLogger(folder)]
        trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=100, help="counted steps of a run")
    parser.add_argument("--warm_up", type=int, default=20, help="steps before them")
    parser.add_argument("--rounds", type=int, default=4, help="runs with and without logging")
    parser.add_argument("--more", type=float, default=10, help="how many times as often to log")
    args = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    drop_unwanted_messages()
    print(circumstances())
    off, on = [], []
    for number in range(args.rounds):
        for more in (0, args.more) if number % 2 else (args.more, 0):
            seconds, cli = one_run(args, more)
            (on if more else off).append(seconds)
            print(f"round {number}, logging x {more:g}: {1000 * seconds:.2f} ms a step", flush=True)
            if more:
                last = cli
    extra = [(with_ - without) / args.more for with_, without in zip(on, off, strict=True)]
    step = median(off)
    print(f"a step without logging: {1000 * step:.2f} ms")
    shares = sorted(100 * e / step for e in extra)
    print(
        f"logging by default: {median(shares):.2f} % (rounds: {shares[0]:.2f} to {shares[-1]:.2f})"
    )
    last.trainer.limit_val_batches = 1.0
    # The first reading also warms up, so a reading without the figure comes before and after.
    tokens = LossByPosition().tokens
    before, with_, after = (validation(last, count) for count in (0, tokens, 0))
    without = min(before, after)
    print(f"a validation: {without:.2f} s, with loss by position {with_:.2f} s")


if __name__ == "__main__":
    main()
