"""A rank that dies or hangs ends the run, in time and by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import write_config

from memorizing_transformers.training.liveness import Liveness, death

ROOT = Path(__file__).parents[2]
SILENCE = 8
"""Seconds; none but the stopped rank should be that silent, even where the machine is busy."""


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()]


def wait_until(condition: object, seconds: float) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("victim", "how", "told"),
    [
        (1, signal.SIGKILL, "error: rank 1 was killed by SIGKILL"),
        (0, signal.SIGSTOP, "error: rank 0 gave no sign of life for 8 s"),
        pytest.param(1, signal.SIGSTOP, "error: rank 1 gave no sign", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, "error: rank 0 ended", marks=pytest.mark.slow),
    ],
)
def test_survivor_names_the_rank_that_is_gone(
    texts: Path, tmp_path: Path, victim: int, how: signal.Signals, told: str
) -> None:
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    timeout = SILENCE if how == signal.SIGSTOP else 120
    options = {"devices": 2, "strategy": "ddp", "max_steps": 10**6, "rank_timeout": timeout}
    arguments = [x for key, value in options.items() for x in (f"--trainer.{key}", str(value))]
    with (tmp_path / "errors").open("w") as errors:
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        pids = [run.pid]
        try:
            checkpoint = tmp_path / "runs/version_0/checkpoints/last.ckpt"
            assert wait_until(checkpoint.exists, 120), (tmp_path / "errors").read_text()
            pids += children(run.pid)
            assert len(pids) == 2
            os.kill(pids[victim], how)
            assert wait_until(lambda: ended(pids[1 - victim]), 40), "the survivor hangs"
            if victim == 1:
                assert run.wait(10) == 1
        finally:
            for pid in pids:
                if not ended(pid):
                    os.kill(pid, signal.SIGKILL)
            run.wait()
    assert told in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (None, None),
        (0, None),
        (3, "ended with exit code 3; its own message says why"),
        (143, "ended with exit code 143; its own message says why"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
    ],
)
def test_only_a_failed_end_is_a_death(code: int | None, told: str | None) -> None:
    assert death(code) == told


class Child:
    """A process that has ended, or not yet."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.parametrize(("codes", "dead"), [((0, None), []), ((0, -9), [2]), ((-9, 0), [1])])
def test_children_that_ended_well_are_left_alone(
    codes: tuple[int | None, ...], dead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    liveness = Liveness()
    liveness._children = [Child(code) for code in codes]
    told: list[str] = []
    monkeypatch.setattr(liveness, "_end", told.append)
    liveness._look_at_children()
    assert [int(line.split()[1]) for line in told] == dead


def test_who_has_ended_is_known_of_children_whatever_their_code() -> None:
    liveness = Liveness()
    liveness._children = [Child(0), Child(None), Child(-9)]
    assert [liveness.has_ended(rank) for rank in range(4)] == [False, True, False, True]
