"""Whatever rules say which checkpoints are kept, no end of a run loses what is finished."""

from __future__ import annotations

import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from small import make_data, make_module
from test_ends import VALIDATING, At, send, steps_in, stop, trainer_of
from test_resume import QUIET

from memorizing_transformers.training.checkpoint import folder as checkpoints
from memorizing_transformers.training.checkpoint.folder import candidates, verify
from memorizing_transformers.training.signals import Interrupted
from memorizing_transformers.training.trainer import MemoryTrainer

RULES: dict[str, list[dict[str, Any]]] = {
    "link": [{"save_last": "link", "monitor": "val/loss"}],
    "link to each": [{"save_last": "link", "every_n_train_steps": 1, "save_top_k": -1}],
    "link of none": [{"save_last": "link", "save_top_k": 0, "every_n_train_steps": 2}],
    "epoch end": [{"save_on_train_epoch_end": True, "save_last": True}],
    "none kept": [{"save_top_k": 0, "every_n_train_steps": 2}],
    "two kept under one name": [
        {"save_top_k": 2, "monitor": "val/loss", "filename": "best", "mode": "max"}
    ],
    "one name, no counter": [
        {"enable_version_counter": False, "filename": "best", "every_n_train_steps": 2}
    ],
    "called last": [{"filename": "last", "monitor": "val/loss", "mode": "max"}],
    "all the time": [{"train_time_interval": {"seconds": 0}, "save_last": True}],
    "weights only": [{"save_weights_only": True, "save_last": True, "every_n_train_steps": 2}],
    "slash": [{"filename": "{step}-{val/loss:.2f}", "save_top_k": 2, "monitor": "val/loss"}],
    "two in one folder": [
        {"save_last": True, "monitor": "val/loss"},
        {"save_last": True, "every_n_train_steps": 2, "save_top_k": 2, "monitor": "val/accuracy"},
    ],
    "two in one folder, no counter": [
        {"enable_version_counter": False, "monitor": "val/loss", "mode": "max", "filename": "x"},
        {"enable_version_counter": False, "every_n_train_steps": 2, "filename": "{step}"},
    ],
    "one name for both": [
        {"enable_version_counter": False, "monitor": "val/loss", "filename": "{step}"},
        {
            "enable_version_counter": False,
            "monitor": "val/loss",
            "filename": "{step}",
            "mode": "max",
            "save_top_k": 3,
        },
    ],
    "two folders": [{"save_last": True}, {"dirpath": "other", "every_n_train_steps": 3}],
    "link beside another": [
        {"save_last": "link", "monitor": "val/loss"},
        {"every_n_train_steps": 1, "save_top_k": 1, "filename": "newest-{step}"},
    ],
}


def slow_disk(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    mark = checkpoints.mark_done

    def slow(*args: Any) -> None:
        time.sleep(seconds)
        mark(*args)

    monkeypatch.setattr(checkpoints, "mark_done", slow)


@pytest.mark.parametrize("name", RULES)
def test_whatever_the_rules_nothing_finished_is_lost(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a callback counts on is there as it was saved, and the end is there too; saving in
    the background, on a slow disk, leaves the same."""
    left = []
    asked: dict[str, int] = {}
    written: list[tuple[Any, ...]] = []
    save, write = MemoryTrainer.save_checkpoint, MemoryTrainer._write

    def noted(self: Any, path: Any, *args: Any) -> None:
        asked[str(path)] = self.global_step
        save(self, path, *args)

    def counted(self: Any, target: Path, *args: Any) -> None:
        written.append((target, args[-1]["step"], args[-1]["weights_only"]))
        write(self, target, *args)

    monkeypatch.setattr(MemoryTrainer, "save_checkpoint", noted)
    monkeypatch.setattr(MemoryTrainer, "_write", counted)
    for background in (False, True):
        home = tmp_path / str(background)
        home.mkdir()
        monkeypatch.chdir(home)
        asked.clear()
        written.clear()
        if background:
            slow_disk(monkeypatch, 0.05)
        rules = []
        for rule in RULES[name]:
            settings = dict(rule)
            if "train_time_interval" in settings:
                settings["train_time_interval"] = timedelta(**settings["train_time_interval"])
            rules.append(ModelCheckpoint(**{"dirpath": "checkpoints", **settings}))
        options = {**QUIET, **VALIDATING, "val_check_interval": 4, "max_steps": 10}
        trainer = MemoryTrainer(callbacks=rules, background_save=background, **options)
        trainer.fit(make_module(), datamodule=make_data(texts))
        for rule in rules:
            for path in filter(None, (*rule.best_k_models, rule.best_model_path)):
                assert verify(Path(path))["step"] == asked[path]
        found = {}
        for path in home.rglob("*.ckpt"):
            if path.name != "trainer.ckpt":
                found[str(path.relative_to(home))] = verify(path)["step"]
        left.append(found)
        assert max(steps_in(home)) == 10
        assert len({*written}) == len(written)
        assert not [path.name for path in home.rglob(".*")]
    assert left[0] == left[1]


def test_a_checkpoint_that_was_removed_is_not_taken_for_the_end(
    texts: Path, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)

    def drop(trainer: Any) -> None:
        path, keep.best_model_path = keep.best_model_path, ""
        trainer.strategy.remove_checkpoint(path)

    trainer = trainer_of(tmp_path, At("on_train_epoch_end", 3, drop), keep=keep, max_steps=3)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert steps_in(tmp_path) == [3]


def test_epochs_are_counted_alike_after_a_stop_within_one(texts: Path, tmp_path: Path) -> None:
    limits = {"limit_train_batches": 6, "max_epochs": 3, "max_steps": -1}
    stopped = trainer_of(tmp_path, At("on_train_batch_end", 8, stop), **limits)
    stopped.fit(make_module(), datamodule=make_data(texts))
    assert steps_in(tmp_path) == [8]
    resumed = trainer_of(tmp_path, **limits)
    path = candidates(tmp_path)[0]
    resumed.fit(make_module(), datamodule=make_data(texts), ckpt_path=path)
    assert (resumed.global_step, resumed.current_epoch) == (18, 3)


def test_a_callback_may_use_what_it_has_just_saved(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk(monkeypatch, 0.3)

    def copy(trainer: Any) -> None:
        trainer.save_checkpoint(tmp_path / "own.ckpt")
        shutil.copytree(tmp_path / "own.ckpt", tmp_path / "copy.ckpt")

    trainer = trainer_of(tmp_path / "x", At("on_train_batch_end", 2, copy), max_steps=3)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert verify(tmp_path / "copy.ckpt")["step"] == 2


def test_a_checkpoint_of_an_exception_survives_a_test(texts: Path, tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        raise RuntimeError("broken")

    callbacks = [OnExceptionCheckpoint(tmp_path), At("on_train_batch_start", 2, fail)]
    trainer = trainer_of(tmp_path / "x", *callbacks, max_steps=3)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(make_module(), datamodule=make_data(texts))
    verify(tmp_path / "on_exception.ckpt")
    again = trainer_of(tmp_path / "x", OnExceptionCheckpoint(tmp_path), max_steps=3)
    again.test(make_module(), datamodule=make_data(texts), ckpt_path=tmp_path / "on_exception.ckpt")
    again.writer.wait()
    verify(tmp_path / "on_exception.ckpt")


def test_the_end_of_another_run_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    """Two runs, one after the other, with a fixed dirpath."""
    for _ in range(2):
        trainer_of(tmp_path, max_steps=3).fit(make_module(), datamodule=make_data(texts))
    assert steps_in(tmp_path) == [3, 3]
    # The same run resumed replaces its own.
    trainer = trainer_of(tmp_path, max_steps=5)
    trainer.fit(make_module(), datamodule=make_data(texts), ckpt_path=candidates(tmp_path)[0])
    assert steps_in(tmp_path) == [5, 3]


@pytest.mark.parametrize("folder", ["", "other"])
@pytest.mark.parametrize("clock", [1, -1])
def test_who_goes_back_finds_the_new_steps_not_the_abandoned_ones(
    clock: int, folder: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the clock of the machine was set back meanwhile."""
    start = time.time_ns()
    moments = iter(range(start, start + clock * 10**6, clock))
    monkeypatch.setattr("time.time_ns", lambda: next(moments))
    for steps, resume in ((8, None), (6, "step=4.ckpt")):
        home = tmp_path / folder if resume else tmp_path
        keep = ModelCheckpoint(home, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = trainer_of(home, keep=keep, max_steps=steps)
        path = tmp_path / resume if resume else None
        trainer.fit(make_module(), datamodule=make_data(texts), ckpt_path=path)
    assert steps_in(tmp_path)[0] == 6
    assert sorted(steps_in(tmp_path)) == [4, 6, 8]


def test_a_second_interrupt_does_not_wait_for_the_step(texts: Path, tmp_path: Path) -> None:
    def twice(trainer: Any) -> None:
        send(signal.SIGINT)(trainer)
        send(signal.SIGINT)(trainer)
        raise AssertionError("not reached")

    trainer = trainer_of(tmp_path, At("on_before_optimizer_step", 2, twice))
    with pytest.raises(Interrupted) as end:
        trainer.fit(make_module(), datamodule=make_data(texts))
    assert end.value.code == 130
    assert "within a step" in str(end.value)
    assert not candidates(tmp_path)


def test_a_test_ends_by_a_signal_too(texts: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, At("on_test_batch_start", 0, send(signal.SIGTERM)))
    with pytest.raises(Interrupted) as end:
        trainer.test(make_module(), datamodule=make_data(texts), verbose=False)
    assert end.value.code == 143
    assert not candidates(tmp_path)
