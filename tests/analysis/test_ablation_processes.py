"""Runs in processes of their own: side by side, told to stop, and left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from filelock import FileLock
from plans import results, rows, write_plan

from memorizing_transformers.analysis import ablate
from memorizing_transformers.analysis.plan_file import load_plan
from memorizing_transformers.analysis.trial import Trial

ROOT = Path(__file__).parent.parent.parent


def test_threads_are_those_given_or_of_the_environment_or_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ablate.Runner([], jobs=2, threads=None).threads == 4
    assert ablate.Runner([], jobs=16, threads=None).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ablate.Runner([], jobs=2, threads=None).threads == 3
    assert ablate.Runner([], jobs=2, threads=5).threads == 5


def test_runs_side_by_side_are_dealt_out_over_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **files: Any) -> None:
            seen.append(env["CUDA_VISIBLE_DEVICES"])
            self.returncode: int | None = None

        def poll(self) -> int | None:
            return self.returncode

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(ablate.subprocess, "Popen", Process)
    trials = []
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials.append(Trial(f"variant {number}", 0, str(folder), "", {}, {}, True, None, "test"))
    runner = ablate.Runner(trials, jobs=3, threads=None)
    waiting = runner._start_ready(trials, set(), MagicMock())
    assert seen == ["2", "5", "2"]
    second: Any = runner._running[1].process
    second.returncode = 1
    runner._collect(set(), MagicMock())
    runner._start_ready(waiting, set(), MagicMock())
    assert seen == ["2", "5", "2", "5"]


@pytest.mark.slow
def test_a_polite_kill_leaves_nobody_behind(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", base, out, budget={"minutes": 30})
    command = [sys.executable, "-m", "memorizing_transformers", "ablate", "--plan", str(plan)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    trial = out / "base" / "seed-0"
    deadline = time.monotonic() + 300
    while not (trial / "progress.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert "stopped; the same command goes on" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    with FileLock(trial / ".lock", timeout=0):
        assert not (trial / "failed.json").exists()


@pytest.mark.slow
def test_a_worker_ends_with_its_runner() -> None:
    worker = (
        "import os, threading, time; from memorizing_transformers.analysis.worker import end_with;"
        "threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start();"
        "print('here', flush=True); time.sleep(300)"
    )
    runner = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    process = subprocess.Popen([sys.executable, "-c", runner, worker], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.kill()
    process.wait()
    killed = time.monotonic()
    # The pipe ends with the last process that holds it.
    assert process.stdout.read() == b""
    assert time.monotonic() < killed + 60
    process.stdout.close()


@pytest.mark.slow
def test_variants_run_side_by_side(base: Path, tmp_path: Path) -> None:
    """Each in a process; what would start from a failed variant fails with it."""
    out = tmp_path / "out"
    # The base's weights do not fit, which only the worker sees.
    variants: list[dict[str, Any]] = [
        {"name": "misfit", "overrides": {"model.d_ff": 8}, "from": "base"},
        {"name": "after", "from": "misfit"},
    ]
    plan = write_plan(
        tmp_path / "plan.yaml", base, out, variants=variants, budget={"tokens": 2 * 64}
    )
    ablate.run_plan(load_plan(plan), jobs=2, threads=1)
    assert set(results(out)) == {"base"}
    failures = {name: row["failures"] for name, row in rows(out / "table.csv").items()}
    assert failures["base"] == ""
    assert "feed_forward" in failures["misfit"]
    assert "misfit" in failures["after"]
