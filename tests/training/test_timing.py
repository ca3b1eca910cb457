"""Where the time of a step goes, by a clock of the test's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from small import Scalars, logs, make_data, make_module, make_trainer

from memorizing_transformers.data import loader
from memorizing_transformers.training.callbacks import StepTiming, timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes on by a second whenever it is read."""
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(loader, "time", clock)
    return clock


def timed(texts: Path, every: int, *callbacks: Callback, **settings: Any) -> Scalars:
    logger = Scalars()
    module = make_module(**settings)
    options = {"max_steps": 10, "logger": logger, "callbacks": [*logs(every), *callbacks]}
    make_trainer(**options).fit(module, datamodule=make_data(texts))
    for reader in module.net.readers().values():
        assert not isinstance(reader.search, timing.TimedSearch)
    return logger


@pytest.mark.parametrize(("every", "steps"), [(4, [1, 5, 9]), (1, [*range(10)]), (50, [1])])
def test_parts_add_up_to_the_step(
    texts: Path, clock: SimpleNamespace, every: int, steps: list[int]
) -> None:
    values = timed(texts, every, layers=[0, 1]).values
    # Reads of the clock: two around each of two searches, one before and one after the step.
    assert values["time/search_ms"] == {step: 2000.0 for step in steps}
    assert values["time/model_ms"] == {step: 3000.0 for step in steps}
    assert values["time/data_ms"] == {step: 1000.0 for step in steps}


def test_nothing_is_timed_unless_asked(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("waited for the device")

    monkeypatch.setattr(timing, "wait_for", fail)
    assert not any(name.startswith("time/") for name in timed(texts, 0).values)
    make_trainer(max_steps=3, callbacks=[StepTiming(1)]).fit(
        make_module(), datamodule=make_data(texts)
    )  # no logger


def test_without_memory_there_is_no_search(texts: Path, clock: SimpleNamespace) -> None:
    for settings in ({"layers": []}, {"size": 0}):
        values = timed(texts, 4, **settings).values
        assert values["time/model_ms"]
        assert "time/search_ms" not in values


def test_accumulated_batches_are_timed_once_a_step(texts: Path, clock: SimpleNamespace) -> None:
    logged = []

    class Listed(Scalars):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.extend((step, name) for name in metrics if name == "time/search_ms")

    module = make_module()
    options = {"accumulate_grad_batches": 3, "callbacks": logs(2)}
    trainer = make_trainer(max_steps=4, logger=Listed(), **options)
    trainer.fit(module, datamodule=make_data(texts))
    assert logged == [(1, "time/search_ms"), (3, "time/search_ms")]


def test_a_run_that_fails_leaves_the_searches_alone(texts: Path) -> None:
    class Fail(Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            if isinstance(module.net.readers()[1].search, timing.TimedSearch):
                raise RuntimeError("out of luck")

    module = make_module()
    trainer = make_trainer(logger=Scalars(), callbacks=[*logs(4), Fail()])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(module, datamodule=make_data(texts))
    assert not isinstance(module.net.layers[1].attention.reader.search, timing.TimedSearch)
