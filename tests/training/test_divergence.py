"""A run whose loss is no longer a number stops with one line, and saves nothing of it as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from pretended import make
from small import make_data, make_module, make_trainer
from two_devices import AWAY, CPU, Away, two_devices

from memorizing_transformers.errors import UserError
from memorizing_transformers.training.checkpoint.folder import candidates
from memorizing_transformers.training.host_side import LossWatch
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.signals import Interrupted

SPOILT = 3
"""The step whose loss is the first that is not finite."""


class Spoil(Callback):
    """Makes a weight no number, before a step or behind it; a signal comes later."""

    def __init__(self, step: int = SPOILT, behind: bool = False, signal_at: int = -1) -> None:
        self.step, self.behind, self.signal_at = step, behind, signal_at

    def _spoil(self, module: Any) -> None:
        if module.global_step == self.step:
            with torch.no_grad():
                module.net.norm.weight.fill_(torch.nan)

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if not self.behind:
            self._spoil(module)
        if module.global_step == self.signal_at:
            trainer.signals.received = 15

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.behind:
            self._spoil(module)


def run(
    root: Path, texts: Path, *callbacks: Callback, device: Any = AWAY, **options: Any
) -> tuple[MemorizingLM, Any]:
    """A run that ends with an error, on a device."""
    trainer: Any = make(
        root,
        device,
        callbacks=[*callbacks],
        limit_val_batches=0,
        logger=False,
        **{"log_every_n_steps": 6, "max_steps": 12, **options},
    )
    module = make_module()
    with pytest.raises((UserError, Interrupted)) as caught:
        trainer.fit(module, datamodule=make_data(texts))
    return module, (trainer, str(caught.value))


def saves(root: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(root / "saved", every_n_train_steps=every, save_top_k=-1)


def finite(path: Path) -> bool:
    """Whether a checkpoint's weights are."""
    state = torch.load(path / "trainer.ckpt", weights_only=True)["state_dict"]
    return all(bool(torch.isfinite(weight).all()) for weight in state.values())


@pytest.mark.parametrize(("every", "stops_at"), [(1, 3), (2, 4), (100, 5)])
def test_elsewhere_it_stops_where_it_logs_or_saves(
    every: int, stops_at: int, texts: Path, tmp_path: Path
) -> None:
    with two_devices("cuda"):
        _, (trainer, line) = run(tmp_path, texts, Spoil(), saves(tmp_path, every))
    assert line.startswith("train/loss = nan at step 3: try a lower model.optimizer.lr")
    assert trainer.global_step in (stops_at, stops_at + 1)
    saved = candidates(tmp_path / "saved") if every < 100 else []
    assert len(saved) == (3 if every == 1 else 1 if every == 2 else 0)
    assert all(finite(path) for path in saved)


def test_it_does_not_stop_earlier(texts: Path, tmp_path: Path) -> None:
    """That would be a wait at every step; on a CPU there is none, and it stops at once."""
    with two_devices("cuda"):
        _, (trainer, line) = run(tmp_path / "away", texts, Spoil(), enable_checkpointing=False)
    _, (here, same) = run(tmp_path / "here", texts, Spoil(), device=CPU, enable_checkpointing=False)
    assert (trainer.global_step, here.global_step) == (5, 3)
    assert line == same


def test_a_signal_saves_nothing_of_it(texts: Path, tmp_path: Path) -> None:
    with two_devices("cuda"):
        _, (_, line) = run(tmp_path, texts, Spoil(signal_at=4), saves(tmp_path, 3))
    assert line.startswith("stopped by SIGTERM at step 5, which could not be saved (train/loss =")
    assert [finite(path) for path in candidates(tmp_path / "saved")] == [True]


def test_the_end_of_a_run_is_looked_at(texts: Path, tmp_path: Path) -> None:
    with two_devices("cuda"):
        _, (_, line) = run(
            tmp_path, texts, Spoil(), enable_checkpointing=False, max_steps=5, log_every_n_steps=50
        )
    assert line.startswith("train/loss = nan at step 3: ")


@pytest.mark.parametrize("device", [AWAY, CPU], ids=["away", "here"])
def test_weights_that_the_last_step_has_spoilt_are_not_saved(
    device: torch.device, texts: Path, tmp_path: Path
) -> None:
    """Whose loss nobody has seen yet."""
    with two_devices("cuda"):
        spoil = Spoil(3, behind=True)
        spoil.step = 4  # behind a step the number is that of the next one
        _, (_, line) = run(tmp_path, texts, spoil, saves(tmp_path, 2), device=device)
    assert line.startswith("weights are not finite at step 4: try a lower")
    assert [finite(path) for path in candidates(tmp_path / "saved")] == [True]


def test_the_same_module_may_train_again(texts: Path) -> None:
    module = make_module()
    with pytest.raises(UserError, match="train/loss = nan at step 3"):
        make_trainer(callbacks=[Spoil()]).fit(module, datamodule=make_data(texts))
    module.load_state_dict(make_module_state(texts))
    make_trainer(max_steps=2).fit(module, datamodule=make_data(texts))


def make_module_state(texts: Path) -> dict[str, Any]:
    fresh = make_module()
    make_trainer(max_steps=1).fit(fresh, datamodule=make_data(texts))
    return fresh.state_dict()


def test_the_first_bad_loss_is_kept() -> None:
    watch = LossWatch()
    assert watch.bad() is None
    for step, loss in enumerate([1.0, 2.0, torch.inf, 3.0, torch.nan]):
        watch.note(torch.tensor(loss), step)
    assert watch.bad() == (torch.inf, 2)
    with two_devices("cuda"):
        watch = LossWatch()
        watch.note(Away(torch.tensor(1.0)), 0)
        assert watch.bad() is None


def test_weights_in_fp16_are_told_the_precision(texts: Path) -> None:
    trainer: Any = make_trainer(precision="16-true")
    with pytest.raises(
        UserError, match=r"train/loss = nan at step \d+: trainer\.precision"
    ) as stop:
        trainer.fit(make_module(), datamodule=make_data(texts))
    assert "16-mixed" in str(stop.value)
    assert "model.optimizer.lr" not in str(stop.value)
