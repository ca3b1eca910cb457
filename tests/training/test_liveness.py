"""A rank that dies or hangs ends the run, in time and by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small import write_config

from memorizing_transformers.training import liveness
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
            # Where rank 0 hangs, rank 1 kills it, since the caller waits for that process.
            code = {(1, signal.SIGKILL): 1, (1, signal.SIGSTOP): 1}.get((victim, how), -9)
            assert run.wait(10) == code
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


def test_who_has_ended_is_known_of_children_whatever_their_code() -> None:
    watcher = Liveness()
    watcher._children = [Child(0), Child(None), Child(-9)]
    assert [watcher.has_ended(rank) for rank in range(4)] == [False, True, False, True]


class Ranks:
    """Two ranks in this process: their callbacks, and what would have ended each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
        self.ended: list[tuple[int, str]] = []
        monkeypatch.setattr(liveness, "INTERVAL", 0.02)
        monkeypatch.setattr(liveness, "LAST_WORDS", 0.1)
        self.port = 0
        self.watchers = [Liveness(timeout) for _ in range(2)]
        for rank, watcher in enumerate(self.watchers):
            monkeypatch.setattr(watcher, "_end", partial(self._note, rank))

    def _note(self, rank: int, what: str, hanging: object = ()) -> None:
        self.ended.append((rank, what))
        self.watchers[rank]._stopping.set()

    def _broadcast(self, port: int) -> int:
        self.port = port or self.port
        return self.port

    def trainer(self, rank: int, children: tuple[subprocess.Popen[bytes], ...] = ()) -> Any:
        strategy = SimpleNamespace(
            cluster_environment=SimpleNamespace(main_address="127.0.0.1"),
            broadcast=self._broadcast,
            launcher=SimpleNamespace(procs=list(children)),
        )
        return SimpleNamespace(world_size=2, global_rank=rank, local_rank=rank, strategy=strategy)

    def start(self, *children: subprocess.Popen[bytes]) -> None:
        for rank, watcher in enumerate(self.watchers):
            watcher.setup(self.trainer(rank, children if rank == 0 else ()), None, "fit")  # type: ignore[arg-type]

    def leave(self, rank: int) -> None:
        self.watchers[rank].teardown(self.trainer(rank), None, "fit")  # type: ignore[arg-type]


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("pass", None),
        ("raise SystemExit(3)", "rank 1 ended with exit code 3; its own message says why"),
        ("import os; os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"),
    ],
)
def test_only_a_child_that_ended_with_an_error_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, code: str, told: str | None
) -> None:
    ranks = Ranks(monkeypatch, timeout=60)
    child = python(code)
    ranks.start(child)
    child.wait()
    wait_until(lambda: bool(ranks.ended), 5 if told else 0.5)
    assert ranks.ended == ([(0, told)] if told else [])
    ranks.leave(1)
    ranks.leave(0)


def test_lightnings_observer_does_not_kill_before_the_rank_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It sees the end of a child only after ours has seen it."""
    ranks = Ranks(monkeypatch, timeout=60)
    child = python("import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)")
    ranks.start(child)
    assert wait_until(lambda: ended(child.pid) or child.returncode is not None, 20)
    while child.poll() is None:
        time.sleep(0.001)
    assert wait_until(lambda: bool(ranks.ended), 0.5)
    ranks.leave(1)
    ranks.leave(0)


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_finished_before_the_other_is_not_called_silent(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(liveness, "GRACE", 0.3)
    ranks = Ranks(monkeypatch, timeout=0.5)
    ranks.start()
    time.sleep(0.2)
    ranks.leave(first)
    time.sleep(1.5)
    assert ranks.ended == []
    ranks.leave(1 - first)
    assert ranks.ended == []


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_stopped_counting_is_called_silent(
    monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    ranks = Ranks(monkeypatch, timeout=0.5)
    ranks.start()
    time.sleep(0.2)
    ranks.watchers[gone]._stopping.set()
    assert wait_until(lambda: bool(ranks.ended), 4)
    assert ranks.ended == [(1 - gone, f"rank {gone} gave no sign of life for 0.5 s")]
    ranks.leave(1)
    ranks.leave(0)


def test_a_rank_that_an_exception_ends_is_not_interrupted_by_what_that_does_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch, timeout=60)
    child = python("import time; time.sleep(0.3); raise SystemExit(1)")
    ranks.start(child)
    ranks.watchers[0].on_exception(ranks.trainer(0), None, ValueError("its own"))  # type: ignore[arg-type]
    child.wait()
    time.sleep(0.5)
    assert ranks.ended == []
    ranks.leave(1)
    ranks.leave(0)
