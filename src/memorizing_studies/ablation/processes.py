"""Runs trials on this machine, each in a process of its own or one after the other in this one.

``python -m memorizing_studies.ablation.processes FOLDER`` is such a process: it runs one trial.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .trial import Trial, run_logged, run_trial

STOP_SECONDS = 30
"""How long a process may take to end after SIGTERM."""
WATCH_SECONDS = 1.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
                    "RAYON_NUM_THREADS")  # fmt: skip


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]


def environment(threads: int) -> dict[str, str]:
    """The environment variables of a new process that runs a trial.

    Args:
        threads: CPU threads of the process.
    """
    # In a clone that is not installed, a new process does not find the packages.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class ProcessRun:
    """A trial in a process of its own.

    Args:
        trial: what runs.
        process: its process.
        gpu: the GPU that it sees, or None if there are none.
    """

    trial: Trial
    process: subprocess.Popen[bytes]
    gpu: str | None

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def end(self) -> str:
        """How it ended."""
        return f"its process ended with code {self.process.returncode}, see log.txt"


class Processes:
    """Runs each trial in a process of its own.

    Args:
        jobs: the number of processes at the same time.
        threads: CPU threads of each process. None: ``OMP_NUM_THREADS`` if set, else the number of
            CPUs / jobs.
    """

    poll_seconds = 0.2

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.jobs = jobs
        given = os.environ.get("OMP_NUM_THREADS", "")
        share = (os.cpu_count() or 1) // jobs
        self.threads = threads or (int(given) if given.isdecimal() else share) or 1

    def start(self, trial: Trial, running: Sequence[Any]) -> ProcessRun:
        """Start a trial, on the GPU that the fewest of the running trials use."""
        variables = {**os.environ, **environment(self.threads)}
        used = [run.gpu for run in running]
        gpu = min(visible_gpus(), key=used.count, default=None)
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", __name__, trial.folder]
        with (trial.path / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        return ProcessRun(trial, process, gpu)

    def stop(self, running: Sequence[Any]) -> None:
        """End the processes; their trials can resume."""
        for run in running:
            run.process.terminate()
        for run in running:
            try:
                run.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()


@dataclass(frozen=True)
class FinishedRun:
    """A trial that has run in this process.

    Args:
        trial: what ran.
    """

    trial: Trial

    def ended(self) -> bool:
        """Always: ``start`` has run it."""
        return True

    def end(self) -> str:
        """How it ended."""
        return "it left no result, see log.txt"


class ThisProcess:
    """Runs trials one after the other in this process."""

    jobs = 1
    poll_seconds = 0.0

    def start(self, trial: Trial, running: Sequence[Any]) -> FinishedRun:
        """Run a trial to its end."""
        try:
            run_logged(trial)
        except Exception:
            logging.getLogger(__name__).debug("%s", trial.folder, exc_info=True)
        return FinishedRun(trial)

    def stop(self, running: Sequence[Any]) -> None:
        """Do nothing: no trial runs outside of ``start``."""


def end_with(parent: int) -> None:
    """End this process as a kill would, as soon as its parent has ended; the trial can resume."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def main() -> None:
    """Run the trial of a folder."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    run_trial(Trial.load(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
