"""Every end of a run is saved once, says what it was, and can be resumed from."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    Timer,
)
from small import Losses, assert_alike, command, make_data, make_module, state
from test_resume import QUIET

from memorizing_transformers.errors import UserError
from memorizing_transformers.training.checkpoint.folder import candidates, read_manifest, verify
from memorizing_transformers.training.ends import end_line
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.signals import Interrupted
from memorizing_transformers.training.trainer import MemoryTrainer


class At(Callback):
    """Does something in a hook at a step."""

    def __init__(self, hook: str, step: int, action: Callable[[Any], None]) -> None:
        self.done = 0

        def act(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                self.done += 1
                action(trainer)

        setattr(self, hook, act)


def stop(trainer: Any) -> None:
    trainer.should_stop = True


def send(number: int) -> Callable[[Any], None]:
    return lambda trainer: os.kill(os.getpid(), number)


def trainer_of(folder: Path, *callbacks: Any, keep: Any = None, **options: Any) -> MemoryTrainer:
    keep = ModelCheckpoint(folder, every_n_train_steps=1000) if keep is None else keep
    settings = {**QUIET, "max_steps": 1000, "limit_val_batches": 0, **options}
    return MemoryTrainer(callbacks=[*callbacks, keep], **settings)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder that training can resume from, all verified."""
    manifests = [verify(path) for path in candidates(folder)]
    return [m["step"] for m in manifests if not m["weights_only"]]


VALIDATING = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
ENDS: dict[str, tuple[Callable[[], list[Any]], dict[str, Any], int | None, str]] = {
    "max_steps": (list, {"max_steps": 7}, 7, "trainer.max_steps = 7"),
    "max_steps at a validation": (list, {"max_steps": 6, **VALIDATING}, 6, "max_steps = 6"),
    "max_epochs": (list, {"max_epochs": 2, "limit_train_batches": 4, "max_steps": -1}, 8, "epochs"),
    "time": (lambda: [Timer(duration={"seconds": 0.2})], {}, None, "the time was up"),
    "early stopping": (
        lambda: [EarlyStopping("val/loss", patience=0, min_delta=1e9)],
        VALIDATING,
        6,
        "EarlyStopping by val/loss",
    ),
    "should_stop": (lambda: [At("on_train_batch_end", 5, stop)], {}, 5, "should_stop"),
    "should_stop in a validation": (
        lambda: [At("on_validation_start", 3, stop)],
        VALIDATING,
        3,
        "should_stop",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_is_saved_once_and_says_what_it_was(
    name: str, texts: Path, tmp_path: Path
) -> None:
    callbacks, options, expected, told = ENDS[name]
    trainer = trainer_of(tmp_path, *callbacks(), **options)
    trainer.fit(make_module(), datamodule=make_data(texts))
    step = trainer.global_step
    assert step == expected or expected is None
    assert steps_in(tmp_path) == [step]
    line = end_line(trainer)
    assert told in line
    assert f"step {step}" in line
    assert "--ckpt_path last" in line
    assert line.count(str(candidates(tmp_path)[0])) == 1


@pytest.mark.parametrize("name", ["should_stop", "should_stop in a validation", "max_steps"])
def test_what_follows_an_end_is_what_would_have_followed(
    name: str, texts: Path, tmp_path: Path
) -> None:
    """Also in the middle of an epoch: no text is left out, none is read twice."""
    callbacks, options, _, _ = ENDS[name]
    losses = [Losses(), Losses(), Losses()]
    for folder, seen, more in (
        ("stopped", losses[0], callbacks()),
        ("resumed", losses[1], []),
        ("whole", losses[2], []),
    ):
        limits = {**options, **({} if folder == "stopped" else {"max_steps": 11})}
        trainer = trainer_of(tmp_path / folder, seen, *more, **limits)
        resume = candidates(tmp_path / "stopped")[0] if folder == "resumed" else None
        trainer.fit(make_module(dropout=0.1), datamodule=make_data(texts), ckpt_path=resume)
    assert losses[0].values + losses[1].values == losses[2].values


def test_a_stop_that_min_steps_forbids_saves_nothing_before_the_end(
    texts: Path, tmp_path: Path
) -> None:
    options = {"min_steps": 6, "limit_train_batches": 4}
    trainer = trainer_of(tmp_path, At("on_train_batch_end", 2, stop), **options)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert trainer.global_step == 6
    assert steps_in(tmp_path) == [6]
    assert trainer._number == 1


SIGNALS = [
    (signal.SIGTERM, "on_train_batch_start", {}, 143),
    (signal.SIGINT, "on_before_optimizer_step", {}, 130),
    (signal.SIGTERM, "on_validation_batch_start", {**VALIDATING, "val_check_interval": 5}, 143),
]


@pytest.mark.parametrize(("number", "hook", "options", "code"), SIGNALS)
def test_a_signal_ends_a_run_behind_the_step_and_the_run_can_be_resumed_exactly(
    number: int, hook: str, options: Any, code: int, texts: Path, tmp_path: Path
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    whole = trainer_of(tmp_path / "whole", losses := Losses(), max_steps=9, **options)
    module = make_module(dropout=0.1)
    whole.fit(module, datamodule=make_data(texts))
    stopped = trainer_of(
        tmp_path / "stopped", first := Losses(), At(hook, 5, send(number)), **options
    )
    with pytest.raises(Interrupted) as end:
        stopped.fit(make_module(dropout=0.1), datamodule=make_data(texts))
    assert end.value.code == code
    step = stopped.global_step
    assert steps_in(tmp_path / "stopped") == [step]
    assert step == (5 if "validation" in hook else 6)
    assert f"at step {step}" in str(end.value)
    assert "--ckpt_path last" in str(end.value)
    assert not [*(tmp_path / "stopped").glob(".*")]
    rest = trainer_of(tmp_path / "rest", second := Losses(), max_steps=9, **options)
    resumed = make_module(dropout=0.1)
    path = candidates(tmp_path / "stopped")[0]
    rest.fit(resumed, datamodule=make_data(texts), ckpt_path=path)
    assert first.values + second.values == losses.values
    assert_alike(state(resumed), state(module))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_accumulated_gradients_are_not_lost_by_a_signal(texts: Path, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3}
    at = At("on_train_batch_start", 2, send(signal.SIGTERM))
    stopped = trainer_of(tmp_path, at, **options)
    with pytest.raises(Interrupted):
        stopped.fit(make_module(), datamodule=make_data(texts))
    assert (stopped.global_step, at.done) == (3, 3)
    assert steps_in(tmp_path) == [3]


def test_more_signals_while_the_end_is_saved_change_nothing(texts: Path, tmp_path: Path) -> None:
    class Again(Callback):
        def on_exception(self, *args: Any) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)

    stopped = trainer_of(tmp_path, Again(), At("on_train_batch_start", 2, send(signal.SIGTERM)))
    with pytest.raises(Interrupted) as end:
        stopped.fit(make_module(), datamodule=make_data(texts))
    assert end.value.code == 143
    assert steps_in(tmp_path) == [3]


def test_a_signal_after_the_last_step_is_not_forgotten(texts: Path, tmp_path: Path) -> None:
    late = At("on_train_end", 3, send(signal.SIGTERM))
    with pytest.raises(Interrupted) as end:
        trainer_of(tmp_path, late, max_steps=3).fit(make_module(), datamodule=make_data(texts))
    assert end.value.code == 143
    assert steps_in(tmp_path) == [3]


def test_a_signal_before_the_first_step_saves_nothing(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    early = At("on_fit_start", 0, send(signal.SIGTERM))
    with pytest.raises(Interrupted) as end:
        trainer_of(folder, early, max_steps=3).fit(make_module(), datamodule=make_data(texts))
    assert end.value.code == 143
    assert "before the first step" in str(end.value)
    assert not candidates(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_ends_with_the_signals_code_one_line_and_no_table(
    number: int, code: int, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = MemorizingLM.training_step

    def interrupted(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MemorizingLM, "training_step", interrupted)
    left, out, err = command("fit", "--config", config)
    assert left == code
    (line,) = [line for line in err.splitlines() if "stopped by" in line]
    assert f"{signal.Signals(number).name} at step 3" in line
    assert "Traceback" not in out + err
    assert "memory switched off" not in out
    assert not [*(tmp_path / "runs").rglob("report.json")]
    monkeypatch.setattr(MemorizingLM, "training_step", original)
    more = ("--trainer.max_steps", 4, "--final_report", "false", "--ckpt_path", "last")
    assert command("fit", "--config", config, *more)[0] == 0
    assert steps_in(tmp_path / "runs")[0] == 4


def test_the_table_names_the_checkpoint_that_holds_its_weights(
    config: Path, tmp_path: Path
) -> None:
    """A run that ends by its epochs, long after the last save by a rule."""
    limits = (
        "--trainer.max_steps",
        -1,
        "--trainer.max_epochs",
        1,
        "--trainer.limit_train_batches",
        5,
    )
    total = ("--model.optimizer.total_steps", 5, "--trainer.val_check_interval", 4)
    code, out, err = command("fit", "--config", config, *limits, *total)
    assert code == 0, err
    named = re.search(r"^checkpoint: (.+)$", out, re.MULTILINE)
    assert named
    assert read_manifest(Path(named[1]))["step"] == 5
    weights = torch.load(Path(named[1]) / "trainer.ckpt", weights_only=True)
    assert weights["global_step"] == 5
    assert "trainer.max_epochs = 1 reached" in out
    tested, _, _ = command("test", "--config", config, "--ckpt_path", "last")
    assert tested == 0


def test_a_run_that_has_nothing_to_do_says_so(config: Path) -> None:
    given = ("fit", "--config", config, "--final_report", "false", "--trainer.max_steps", 3)
    assert command(*given)[0] == 0
    code, out, _ = command(*given, "--ckpt_path", "last")
    assert code == 0
    assert "trainer.max_steps = 3 reached" in out
    code, out, _ = command(*given, "--trainer.limit_train_batches", 0)
    assert code == 0
    assert "no training batches" in out


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_name_that_was_not_logged_ends_a_run_with_its_last_step_saved(
    kind: Any, texts: Path, tmp_path: Path
) -> None:
    place = {"dirpath": tmp_path} if kind is ModelCheckpoint else {}
    trainer = trainer_of(tmp_path, kind(monitor="mine", **place), **VALIDATING)
    with pytest.raises(Exception, match="mine"):
        trainer.fit(make_module(), datamodule=make_data(texts))
    assert steps_in(tmp_path) == [3]


def test_what_others_log_is_not_known(texts: Path, tmp_path: Path) -> None:
    """A callback of the user's own may log any name."""

    class Mine(Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            trainer.callback_metrics["val/mine"] = torch.tensor(1.0)

    stopping = EarlyStopping("val/mine", patience=0)
    trainer = trainer_of(tmp_path, Mine(), stopping, **VALIDATING)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert trainer.global_step == 6
    with pytest.raises(UserError, match=r"EarlyStopping: monitor = 'val/mine': is not logged"):
        trainer_of(tmp_path, EarlyStopping("val/mine"), **VALIDATING).fit(
            make_module(), datamodule=make_data(texts)
        )
