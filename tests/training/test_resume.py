"""A stopped run goes on as if it had never stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import QUIET
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Losses, assert_alike, make_data, make_module, state

from memorizing_transformers.errors import UserError
from memorizing_transformers.training.checkpoint.folder import (
    candidates,
    newest_good,
    read_manifest,
)
from memorizing_transformers.training.checkpoint.rank_state import (
    load_rows,
    random_state,
    set_random_state,
)
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.run_folders import resolve_checkpoint
from memorizing_transformers.training.trainer import MemoryTrainer

VALIDATING: dict[str, Any] = {
    "val_check_interval": 4,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 1,
}


def fit(
    texts: Path,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    every: int = 1,
    trainer_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[MemorizingLM, list[float]]:
    """Train with a checkpoint every so many steps; the module and every step's loss."""
    losses = Losses()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
    options = {**QUIET, **VALIDATING, **(trainer_options or {})}
    trainer = MemoryTrainer(max_steps=steps, callbacks=[losses, keep], **options)
    module = make_module(**{"dropout": 0.1, "xl_cache": 16, **settings})
    data = make_data(texts, **(data_options or {}))
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module, losses.values


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several memory layers in bf16": {"layers": [0, 1], "dtype": "bfloat16"},
    "memory in int8": {"dtype": "int8"},
    "joint with bias": {"combine": "joint", "position_bias": "t5"},
    "no XL cache": {"xl_cache": 0},
    "bucketed search": {"search": "bucketed"},
    "bf16-mixed": {"trainer_options": {"precision": "bf16-mixed"}},
    "accumulation": {"trainer_options": {"accumulate_grad_batches": 2}},
    "refreshed": {"refresh_every_n_steps": 2, "size": 50},
    "refreshed under accumulation, old and drifted pairs dropped": {
        "trainer_options": {"accumulate_grad_batches": 2},
        "optimizer": {"lr": 0.1},
        "size": 200,
        "layers": [0, 1],
        "refresh_every_n_steps": 3,
        "drop_after_n_steps": 2,
        "drop_below_cosine": 0.95,
    },
    "muon": {"optimizer": {"name": "muon", "memory_lr_factor": 10}},
    "value residual and shortcut": {"value_residual": True, "embedding_shortcut": True},
    "adafactor": {"optimizer": {"name": "adafactor", "schedule": "rsqrt", "warmup_steps": 3}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_equals_the_unbroken_one_to_the_bit(
    name: str, texts: Path, tmp_path: Path
) -> None:
    options = VARIANTS[name]
    whole, losses = fit(texts, tmp_path / "whole", 9, **options)
    # Step 3 lies before a validation, step 4 is saved just as one runs.
    for stop in (3, 4):
        checkpoint = tmp_path / "whole" / f"step={stop}.ckpt"
        resumed, rest = fit(texts, tmp_path / f"from{stop}", 9, checkpoint, **options)
        assert rest == losses[-len(rest) :]
        assert len(rest) < len(losses)
        assert_alike(state(resumed), state(whole))


def test_what_was_dropped_before_the_stop_stays_dropped(texts: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"size": 200, "drop_below_cosine": 0.9, "optimizer": {"lr": 0.3}}
    whole, losses = fit(texts, tmp_path / "whole", 12, **settings)
    checkpoint = tmp_path / "whole" / "step=10.ckpt"  # step 8 looked for drift, step 16 would
    rows = load_rows(checkpoint, range(1), 0, 4)
    assert (rows["memory.1.oldest"] > 0).any()
    resumed, rest = fit(texts, tmp_path / "resumed", 12, checkpoint, **settings)
    assert rest == losses[10:]
    assert_alike(state(resumed), state(whole))


def test_resuming_goes_on_over_the_end_of_an_epoch(texts: Path, tmp_path: Path) -> None:
    limits = {"limit_train_batches": 5, "val_check_interval": None, "check_val_every_n_epoch": 1}
    whole, losses = fit(texts, tmp_path / "whole", 12, trainer_options=limits)
    for stop in (4, 5, 6, 10):
        checkpoint = tmp_path / "whole" / f"step={stop}.ckpt"
        resumed, rest = fit(texts, tmp_path / f"{stop}", 12, checkpoint, trainer_options=limits)
        assert rest == losses[stop:]
        assert_alike(state(resumed), state(whole))


def test_chain_of_stops_equals_one_run(texts: Path, tmp_path: Path) -> None:
    whole, losses = fit(texts, tmp_path / "whole", 10)
    seen: list[float] = []
    last = None
    for stop in (2, 3, 7, 10):
        module, more = fit(texts, tmp_path / "parts", stop, last)
        seen += more
        last = candidates(tmp_path / "parts")[0]
    assert seen == losses
    assert_alike(state(module), state(whole))


def test_moved_checkpoint_still_works(texts: Path, tmp_path: Path) -> None:
    whole, losses = fit(texts, tmp_path / "whole", 6)
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    (tmp_path / "whole" / "step=3.ckpt").rename(moved)
    resumed, rest = fit(texts, tmp_path / "resumed", 6, moved)
    assert rest == losses[3:]
    assert_alike(state(resumed), state(whole))


def test_larger_memory_goes_on_from_the_smaller_one(texts: Path, tmp_path: Path) -> None:
    small, _ = fit(texts, tmp_path / "small", 3)
    written = small.banks["train"].memories[1].written
    large, _ = fit(texts, tmp_path / "large", 4, tmp_path / "small" / "step=3.ckpt", size=64)
    memory = large.banks["train"].memories[1]
    goes_on = memory.written > written
    assert goes_on.any()
    assert (memory.written[goes_on] == written[goes_on] + 16).all()
    assert memory.fill.max() > small.banks["train"].memories[1].size


@pytest.mark.parametrize("places", [("model", "cpu"), ("cpu", "model")])
def test_memory_may_change_its_device(places: tuple[str, str], texts: Path, tmp_path: Path) -> None:
    whole, losses = fit(texts, tmp_path / "whole", 5, device=places[0])
    checkpoint = tmp_path / "whole" / "step=3.ckpt"
    resumed, rest = fit(texts, tmp_path / "rest", 5, checkpoint, device=places[1])
    assert rest == losses[3:]
    assert_alike(state(resumed), state(whole))


def test_memory_can_be_left_out_and_is_said_to_be(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit(texts, tmp_path / "whole", 3, save_memory=False)
    checkpoint = tmp_path / "whole" / "step=3.ckpt"
    assert read_manifest(checkpoint)["memory"] is False
    resumed, _ = fit(texts, tmp_path / "resumed", 4, checkpoint, save_memory=False)
    assert resumed.banks["train"].memories[1].written.max() <= 16
    assert "holds no memory" in caplog.text


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"batch_rows": 2}, "data.batch_rows = 2"),
        ({"segment_length": 8}, "data.segment_length = 8"),
        ({"seed": 5}, "data.seed = 5"),
        ({"cut_tokens": 64}, "data.cut_tokens = 64"),
        ({"shuffle_tokens": 8}, "data.shuffle_tokens = 8"),
        ({"test_fraction": 0.3}, "data"),
    ],
)
def test_other_order_of_tokens_is_refused(
    changed: dict[str, Any], names: str, texts: Path, tmp_path: Path
) -> None:
    fit(texts, tmp_path / "whole", 2)
    with pytest.raises(UserError, match=names):
        fit(
            texts,
            tmp_path / "resumed",
            4,
            tmp_path / "whole" / "step=2.ckpt",
            data_options=changed,
        )


def test_dropped_checkpoints_leave_nothing_behind(texts: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    trainer = MemoryTrainer(max_steps=5, callbacks=[keep], limit_val_batches=0, **QUIET)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=5.ckpt"]
    assert newest_good(tmp_path) is not None


def test_last_is_the_newest_whole_checkpoint_of_the_newest_run(texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    fit(texts, root / "version_0" / "checkpoints", 2)
    fit(texts, root / "version_1" / "checkpoints", 3)
    found = Path(str(resolve_checkpoint("last", root)))
    assert found == root / "version_1" / "checkpoints" / "step=3.ckpt"
    (found / "rank-00000.safetensors").unlink()
    assert Path(str(resolve_checkpoint("last", root))).name == "step=2.ckpt"


def test_random_states_come_back() -> None:
    saved = random_state()
    first = (
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
    )
    set_random_state(saved)
    again = (
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
    )
    assert first == again
