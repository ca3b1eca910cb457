"""Tokens per second: which tokens, and when they are logged."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
        callbacks=[Throughput()],
    )
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert [*logger.values[NAME]] == [*logger.values["train/loss"]]
    assert [*logger.values[NAME]] == [*range(every - 1, 15, every)]
    assert all(speed > 0 for speed in logger.values[NAME].values())


def test_logging_never_is_allowed(texts: Path) -> None:
    trainer = make_trainer(
        max_steps=3, log_every_n_steps=0, logger=Scalars(), callbacks=[Throughput()]
    )
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


class Strategy:
    """Two ranks, of which the other one reads so many tokens a batch."""

    root_device = "cpu"

    def __init__(self, others: int) -> None:
        self.others, self.batches = others, 0

    def reduce(self, own: Any, reduce_op: str) -> Any:
        assert reduce_op == "sum"
        total, self.batches = own + self.others * self.batches, 0
        return total


def read(throughput: Throughput, strategy: Strategy, tokens: list[int], every: int) -> list[float]:
    """Let this rank read batches of so many tokens; the logged speeds."""
    speeds: list[float] = []
    trainer: Any = SimpleNamespace(world_size=2, log_every_n_steps=every, strategy=strategy)
    module: Any = SimpleNamespace(
        log=lambda name, value, prog_bar: speeds.append(float(value)), on_host=lambda batch: batch
    )
    for index, count in enumerate(tokens):
        strategy.batches += 1
        batch: Any = SimpleNamespace(mask=torch.ones(count))
        throughput.on_train_batch_start(trainer, module, batch, index)
        throughput.on_train_batch_end(trainer, module, None, batch, index)
    throughput.on_train_end(trainer, module)
    return speeds


def test_ranks_with_unequal_padding_are_counted_as_they_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(callbacks.throughput, "time", clock)
    throughput = Throughput()
    speeds = read(throughput, Strategy(others=11), [5, 3, 0, 9, 4], every=2)
    assert throughput.tokens == 21 + 5 * 11
    assert speeds == [pytest.approx(x) for x in (15.0, 15.0, 15.5, 15.5)]


def test_the_first_speed_after_a_resume_is_that_since_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(callbacks.throughput, "time", clock)
    first, resumed = Throughput(), Throughput()
    assert read(first, Strategy(others=7), [93] * 6, every=3)[-1] == 100.0
    resumed.load_state_dict(first.state_dict())
    assert read(resumed, Strategy(others=1), [1] * 3, every=3) == [2.0]
    assert resumed.tokens == 600 + 6
    assert resumed.seconds == 9.0
