"""Tokens per second: which tokens, and when they are logged."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from small import Scalars, make_data, make_module, make_trainer

from memorizing_transformers.training import callbacks
from memorizing_transformers.training.callbacks import Throughput

NAME = "throughput/tokens_per_second"


class Count(Callback):
    """Counts real tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int):
        self.tokens += int(batch.mask.sum())


def test_padding_is_no_throughput(texts: Path) -> None:
    throughput, count = Throughput(), Count()
    trainer = make_trainer(max_steps=40, callbacks=[throughput, count])
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert throughput.tokens == count.tokens < 40 * 4 * 16
    assert throughput.seconds > 0


@pytest.mark.parametrize("every", [1, 3, 4])
def test_it_is_logged_in_every_epoch(texts: Path, every: int) -> None:
    logger = Scalars()
    trainer = make_trainer(
        max_steps=-1,
        max_epochs=3,
        limit_train_batches=5,
        log_every_n_steps=every,
        logger=logger,
    )
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert [*logger.values[NAME]] == [*logger.values["train/loss"]]
    assert [*logger.values[NAME]] == [*range(every - 1, 15, every)]
    assert all(speed > 0 for speed in logger.values[NAME].values())


def test_logging_never_is_allowed(texts: Path) -> None:
    trainer = make_trainer(max_steps=3, log_every_n_steps=0, logger=Scalars())
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert trainer.global_step == 3


def test_validation_takes_none_of_the_time(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()  # a clock that goes on by a second whenever it is read
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(callbacks.throughput, "time", clock)

    class Slow(Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            for _ in range(1000):
                clock.perf_counter()

    throughput, count, logger = Throughput(), Count(), Scalars()
    trainer = make_trainer(
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        log_every_n_steps=2,
        callbacks=[throughput, count, Slow()],
        logger=logger,
    )
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert throughput.seconds == 4.0
    assert sum(logger.values[NAME].values()) * 2 == count.tokens
