"""Trials in processes of their own: several at a time, stopped, and without their runner."""

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

from memorizing_studies.ablation import processes
from memorizing_studies.ablation import runner as ablate
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_studies.ablation.trial import Trial

ROOT = Path(__file__).parent.parent.parent


def test_threads_are_given_or_of_the_environment_or_a_share_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.Processes(2, None).threads == 4
    assert processes.Processes(16, None).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.Processes(2, None).threads == 3
    assert processes.Processes(2, 5).threads == 5


class FakeProcesses:
    """Replaces ``subprocess.Popen``. Each process ends after a given number of polls."""

    def __init__(self, lives: list[int]) -> None:
        self.lives = lives
        self.alive: list[str] = []
        """GPUs of the processes that are alive."""
        self.crowds: list[list[str]] = []
        """``alive`` after each start."""
        self.threads: set[str] = set()

    def __call__(self, command: list[str], env: dict[str, str], **files: Any) -> Any:
        gpu, polls = env.get("CUDA_VISIBLE_DEVICES", "none"), [self.lives.pop(0)]
        self.alive.append(gpu)
        self.crowds.append([*self.alive])
        self.threads |= {env[name] for name in processes.THREAD_VARIABLES}
        process = MagicMock(returncode=None)

        def poll() -> int | None:
            polls[0] -= 1
            if polls[0] == 0:
                self.alive.remove(gpu)
                process.returncode = 1
            return process.returncode

        process.poll = poll
        return process


@pytest.mark.parametrize(
    ("gpus", "jobs"),
    [("2,5", 3), ("2,5", 1), ("0,1,2", 2), ("7", 3), ("", 2), ("1,0", 9), ("4,", 2)],
)
def test_trials_are_split_over_the_gpus(
    gpus: str, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = [5, 2, 3, 1, 4, 1, 2]
    fake = FakeProcesses([*lives])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(processes.subprocess, "Popen", fake)
    monkeypatch.setattr(processes.Processes, "poll_seconds", 0)
    trials = []
    for number in range(len(lives)):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials.append(Trial(f"variant {number}", 0, str(folder), "", {}, {}, True, None, "test"))
    ablate.Runner(trials, processes.Processes(jobs, 3)).run()
    assert all("code 1" in str(trial.failure) for trial in trials)
    assert fake.threads == {"3"}
    assert max(map(len, fake.crowds)) == min(jobs, len(trials))
    named = [gpu for gpu in gpus.split(",") if gpu]
    for crowd in fake.crowds:
        counts = [crowd.count(gpu) for gpu in named] or [len(crowd)]
        assert sum(counts) == len(crowd)
        # No two trials share a GPU while another GPU is free.
        assert max(counts) <= -(-jobs // len(counts))
        assert max(counts) == 1 or min(counts) > 0


@pytest.mark.slow
def test_sigterm_ends_all_processes(base: Path, tmp_path: Path) -> None:
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
    assert "stopped; the same command resumes" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    with FileLock(trial / ".lock", timeout=0):
        assert not (trial / "failed.json").exists()


@pytest.mark.slow
def test_a_process_ends_with_its_runner() -> None:
    child = (
        "import os, threading, time; from memorizing_studies.ablation.processes import end_with;"
        "threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start();"
        "print('here', flush=True); time.sleep(300)"
    )
    runner = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    process = subprocess.Popen([sys.executable, "-c", runner, child], stdout=subprocess.PIPE)
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
def test_variants_run_at_the_same_time(base: Path, tmp_path: Path) -> None:
    """Each in a process. A variant that starts from a failed variant fails too."""
    out = tmp_path / "out"
    # The base's weights do not fit, which only the new process notices.
    variants: list[dict[str, Any]] = [
        {"name": "misfit", "overrides": {"data.tokenizer": "bpe"}, "from": "base"},
        {"name": "after", "from": "misfit"},
    ]
    plan = write_plan(
        tmp_path / "plan.yaml", base, out, variants=variants, budget={"tokens": 2 * 64}
    )
    ablate.run_plan(load_plan(plan), processes.Processes(2, 1))
    assert set(results(out)) == {"base"}
    failures = {name: row["failures"] for name, row in rows(out / "table.csv").items()}
    assert failures["base"] == ""
    assert "another tokenizer" in failures["misfit"]
    assert "misfit" in failures["after"]
