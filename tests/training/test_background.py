"""What is written in the background is what was there, in order, and fails aloud."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small import command, write_config

from memorizing_transformers.memory import Memory, MemoryBank
from memorizing_transformers.training.checkpoint.background import Writer
from memorizing_transformers.training.checkpoint.folder import candidates, verify
from memorizing_transformers.training.checkpoint.rank_state import RankPart

ROOT = Path(__file__).resolve().parents[2]


def test_jobs_are_done_in_order_and_behind_the_caller() -> None:
    writer, gate = Writer(), threading.Event()
    done: list[int] = []
    writer.submit(lambda: (gate.wait(), done.append(0))[1])
    for number in (1, 2):
        writer.submit(lambda number=number: done.append(number))
    assert done == []
    gate.set()
    writer.wait()
    assert done == [0, 1, 2]


def test_failure_is_raised_by_the_next_call_and_the_other_jobs_are_done() -> None:
    writer, gate = Writer(), threading.Event()
    done: list[int] = []

    def fail() -> None:
        gate.wait()
        raise OSError("no space")

    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    gate.set()
    with pytest.raises(OSError, match="no space"):
        writer.wait()
    assert done == [1]
    writer.wait()


@pytest.mark.parametrize("failing", [True, False])
def test_what_a_failed_write_was_to_replace_is_not_removed(failing: bool) -> None:
    """Whenever the failure becomes known."""
    writer, gate = Writer(), threading.Event()
    done: list[str] = []

    def write() -> None:
        gate.wait()
        if failing:
            raise OSError("no space")

    writer.submit(write)
    writer.submit(lambda: done.append("removed"), only_after_success=True)
    gate.set()
    if failing:
        with pytest.raises(OSError, match="no space"):
            writer.wait()
    else:
        writer.wait()
    assert done == ([] if failing else ["removed"])


def test_copied_part_does_not_change_with_the_memory() -> None:
    memory = Memory(2, 1, 4, 3)
    bank = MemoryBank(2, {0: memory})
    memory.write(torch.ones(2, 1, 2, 3), torch.ones(2, 1, 2, 3))
    part = RankPart(0, bank)
    rows = {name: tensor for name, tensor in part.tensors.items() if name.startswith("rows.")}
    before = {name: tensor.clone() for name, tensor in rows.items()}
    memory.write(torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3), step=7)
    for name, tensor in rows.items():
        assert torch.equal(tensor, before[name]), name


def limit_files() -> None:
    """No file may grow beyond 8 kB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.parametrize("background", ["true", "false"])
def test_full_disk_ends_the_run_with_one_line(texts: Path, tmp_path: Path, background: str) -> None:
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    given = ("fit", "--config", config, "--final_report", "false", "--trainer.logger", "false")
    assert command(*given, "--trainer.max_steps", 8)[0] == 0
    folder = tmp_path / "runs" / "checkpoints"
    before = candidates(folder)
    more = ("--trainer.background_save", background, "--ckpt_path", before[0])
    # In a process of its own: under such a limit pytest could not write its own report either.
    run = subprocess.run(
        [sys.executable, "train.py", *map(str, (*given, "--trainer.max_steps", 16, *more))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert "could not be written" in line
    assert candidates(folder) == before
    for checkpoint in before:
        verify(checkpoint)
    assert not list(folder.glob(".*.partial"))


def test_last_step_is_saved_whatever_the_callback_does(texts: Path, tmp_path: Path) -> None:
    """And going on from there is going on: the losses are those of one longer run."""
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    given = ("fit", "--config", config, "--final_report", "false", "--trainer.logger", "false")
    given += ("--trainer.val_check_interval", 1000, "--model.optimizer.schedule", "constant")
    assert command(*given, "--trainer.max_steps", 11)[0] == 0
    (last,) = candidates(tmp_path / "runs" / "checkpoints")
    assert last.name == "last.ckpt"
    other = ("--trainer.default_root_dir", tmp_path / "resumed", "--ckpt_path", last)
    assert command(*given, "--trainer.max_steps", 19, *other)[0] == 0
    whole = ("--trainer.default_root_dir", tmp_path / "whole")
    assert command(*given, "--trainer.max_steps", 19, *whole)[0] == 0
    resumed, unbroken = (
        torch.load(
            tmp_path / name / "checkpoints" / "last.ckpt" / "trainer.ckpt", weights_only=True
        )["state_dict"]
        for name in ("resumed", "whole")
    )
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name
