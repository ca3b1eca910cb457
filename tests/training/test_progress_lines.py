"""Progress in lines, where there is no terminal."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from small import command, make_data, make_module, make_trainer

from memorizing_transformers.data.tokens import prepare
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.pace import Pace, duration
from memorizing_transformers.training.callbacks import ProgressLines, Throughput
from memorizing_transformers.training.cli import draws_a_bar, read_config


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Slow(ProgressLines):
    """Lets a second pass in every batch."""

    clock: Clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.now += 1
        super().on_train_batch_end(*args)

    def on_validation_batch_end(self, *args: Any) -> None:
        self.clock.now += 1
        super().on_validation_batch_end(*args)

    def on_test_batch_end(self, *args: Any) -> None:
        self.clock.now += 1
        super().on_test_batch_end(*args)

    def on_predict_batch_end(self, *args: Any) -> None:
        self.clock.now += 1
        super().on_predict_batch_end(*args)


def lines_of(
    clock: Clock, texts: Path, every: float, what: str = "fit", **options: Any
) -> list[str]:
    """What a run prints whose batches take a second each."""
    callback = Slow(every)
    callback.clock = clock
    given = {"max_steps": 40, "log_every_n_steps": 1, "enable_progress_bar": True, **options}
    checkpoint = given.pop("ckpt_path", None)
    trainer = make_trainer(**given, callbacks=[callback, Throughput()])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run = getattr(trainer, what)
        run(make_module(), datamodule=make_data(texts), ckpt_path=checkpoint)
    kinds = ("step", "validation", "test: batch", "predict: batch")
    return [line for line in out.getvalue().splitlines() if line.startswith(kinds)]


def steps_of(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step")]


@pytest.mark.parametrize("every", [1, 3, 10, 39, 1000])
def test_there_is_a_line_for_the_first_step_and_then_one_every_so_often(
    clock: Clock, texts: Path, every: int
) -> None:
    lines = lines_of(clock, texts, every, limit_val_batches=0)
    assert steps_of(lines) == [*range(1, 41, every)]


def test_a_line_says_what_was_logged_and_what_is_left(clock: Clock, texts: Path) -> None:
    lines = lines_of(clock, texts, 10, limit_val_batches=0)
    form = r"step (\d+)/40, loss \d+\.\d{4}, perplexity \d+\.\d\d, [\d,]+ tokens/s, (\S+) left"
    for line in lines[1:]:
        match = re.fullmatch(form, line)
        assert match, line
        assert match[2] == duration(40 - int(match[1]))


def test_what_is_left_follows_from_whatever_bounds_the_run(clock: Clock, texts: Path) -> None:
    batches = len(make_data_loader(texts))
    options = {"limit_val_batches": 0, "max_epochs": 1, "max_steps": -1}
    line = lines_of(clock, texts, 5, **options)[1]
    assert line.startswith(f"step 6/{batches},")
    assert line.endswith(f"{duration(batches - 6)} left")
    line = lines_of(clock, texts, 5, **options, accumulate_grad_batches=2)[1]
    assert f"/{-(-batches // 2)}," in line


def test_the_nearest_of_several_bounds_counts(clock: Clock, texts: Path) -> None:
    for seconds, left in ((20, 20 - 6), (1000, 40 - 6)):
        limits = {"max_time": {"seconds": seconds}, "limit_val_batches": 0}
        line = lines_of(clock, texts, 5, **limits)[1]
        assert line.startswith("step 6/40,")
        assert line.endswith(f", {duration(left)} left")


def test_a_resumed_run_counts_its_own_time(clock: Clock, texts: Path, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=20)
    trainer.fit(make_module(), datamodule=make_data(texts))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    lines = lines_of(clock, texts, 5, limit_val_batches=0, ckpt_path=tmp_path / "half.ckpt")
    assert steps_of(lines) == [21, 26, 31, 36]
    for line, step in zip(lines, steps_of(lines), strict=True):
        assert line.endswith(f" {duration(40 - step)} left")


def make_data_loader(texts: Path) -> Any:
    data = make_data(texts)
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), datamodule=data)
    return trainer.train_dataloader


def test_a_run_without_an_end_says_its_step_alone(clock: Clock, texts: Path) -> None:
    limits = {"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 5}}
    lines = lines_of(clock, texts, 1000, **limits, limit_val_batches=0)
    assert lines[0].startswith("step 1, ")


def test_evaluations_say_their_batches_and_validations_their_result(
    clock: Clock, texts: Path
) -> None:
    lines = lines_of(clock, texts, 4, val_check_interval=20, limit_val_batches=10)
    batches = [line for line in lines if line.startswith("validation: batch")]
    assert [line.split()[2] for line in batches] == ["4/10,", "8/10,"] * 2
    assert [line.split()[-2] for line in batches] == ["0:00:06", "0:00:02"] * 2
    results = [line for line in lines if line.startswith("validation at step")]
    assert [line.split(":")[0] for line in results] == [f"validation at step {n}" for n in (20, 40)]
    shown = re.search(r"perplexity (\S+)", results[0])
    assert shown
    assert f"validation perplexity {shown[1]}" in lines[lines.index(results[0]) + 1]
    for what in ("validate", "test", "predict"):
        found = lines_of(clock, texts, 1, what, limit_val_batches=1.0)
        name = "validation" if what == "validate" else what
        assert found
        assert all(line.startswith(f"{name}: batch ") for line in found)


def test_the_sanity_check_says_nothing(clock: Clock, texts: Path) -> None:
    options = {"limit_val_batches": 5, "val_check_interval": 20}
    lines = lines_of(clock, texts, 1, num_sanity_val_steps=5, **options)
    assert lines[0].startswith("step 1/40")


def test_frequent_validations_do_not_flood(clock: Clock, texts: Path) -> None:
    lines = lines_of(clock, texts, 20, val_check_interval=1, limit_val_batches=1)
    assert 2 <= sum(line.startswith("validation at") for line in lines) <= 5


def test_other_ranks_and_a_disabled_bar_are_silent(clock: Clock, texts: Path) -> None:
    class Other(Slow):
        def on_fit_start(self, *args: Any) -> None:
            self.disable()

    callback = Other(1)
    callback.clock = clock
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        make_trainer(max_steps=4, enable_progress_bar=True, callbacks=[callback]).fit(
            make_module(), datamodule=make_data(texts)
        )
    assert out.getvalue() == ""


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_the_interval_must_be_positive(seconds: float) -> None:
    with pytest.raises(ConfigError, match="every_n_seconds"):
        ProgressLines(seconds)


@pytest.mark.parametrize(("flag", "lines"), [("true", True), ("null", True), ("false", False)])
def test_a_run_that_is_not_on_a_terminal_prints_lines(config: Path, flag: str, lines: bool) -> None:
    code, out, _ = command("fit", "--config", config, f"--trainer.enable_progress_bar={flag}")
    assert code == 0
    assert ("step 1/24" in out) == lines
    assert "\r" not in out


class Terminal(io.StringIO):
    """Output that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_bar_stays(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, lines in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr("sys.stdout", stream)
        trainer: Any = read_config(str(config), ["--trainer.enable_progress_bar=true"]).trainer
        assert isinstance(trainer.progress_bar_callback, ProgressLines) == lines
        assert trainer.progress_bar_callback is not None


def test_a_bar_of_the_users_own_is_left_alone() -> None:
    settings = {"enable_progress_bar": None, "barebones": False}
    assert draws_a_bar(settings, [])
    assert not draws_a_bar(settings, [TQDMProgressBar()])
    assert not draws_a_bar({**settings, "barebones": True}, [])


def test_tokenising_says_how_far_it_is(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    documents = [prepare.Document(name=str(n), text="x" * 500_000) for n in range(100)]
    for _ in prepare._progress(iter(documents), "tokenising"):
        clock.now += 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "tokenising: 31 documents, 15.5M characters",
        "tokenising: 61 documents, 30.5M characters",
        "tokenising: 91 documents, 45.5M characters",
    ]


def test_a_pace_never_hurries(clock: Clock) -> None:
    pace = Pace(10, at_once=True)
    assert pace.due()
    clock.now += 100
    assert pace.due()
    clock.now += 9.9
    assert not pace.due()
    clock.now += 0.1
    assert pace.due()
    assert not Pace(10).due()
