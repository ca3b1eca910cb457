"""Runs a plan: each variant once with each seed, side by side if told so, never twice."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from memorizing_transformers.errors import ConfigError, UserError

from .json_files import read_json
from .plan import Plan, resolve
from .table import write_outcome
from .trial import Trial, run_trial

POLL_SECONDS = 0.2
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Between two states of the progress bar."""
STOP_SECONDS = 30
"""How long a worker may take to leave when it is told to."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
                    "RAYON_NUM_THREADS")  # fmt: skip


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]


def make_trials(plan: Plan) -> list[Trial]:
    """Every trial, those first that others start from, each noted in its folder.

    Raises:
        UserError: where a config cannot work, a folder holds a trial of another config, or the
            plan's folder cannot be written.
    """
    out, trials = Path(plan.out), []
    order = sorted(plan.variants, key=lambda variant: _depth(plan, variant.name))
    configs = {variant.name: resolve(plan, variant, plan.seeds[0]) for variant in order}
    asked: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in plan.seeds:
        for variant in order:
            folder = out / variant.name / f"seed-{seed}"
            settings = plan.settings(variant, seed)
            resolved = {**configs[variant.name], **settings}
            limits = {k: resolved[k] for k in ("trainer.max_steps", "trainer.max_time")}
            source = None if variant.source is None else out / variant.source / f"seed-{seed}"
            trial = Trial(
                variant=variant.name,
                seed=seed,
                folder=str(folder),
                base=plan.base,
                settings=settings,
                limits={key: value for key, value in limits.items() if value is not None},
                train=variant.run == "train",
                source=None if source is None else str(source),
                split=plan.split,
            )
            own = {"train": trial.train, "split": plan.split, "from": variant.source, **resolved}
            if variant.source is not None:
                weights = asked[variant.source, seed]
                own |= {f"from.{key}": value for key, value in weights.items()}
            asked[variant.name, seed] = own
            trials.append(trial)
    try:
        for trial in trials:
            _check_unchanged(trial, asked[trial.variant, trial.seed])
        for trial in trials:
            trial.save(asked[trial.variant, trial.seed])
    except OSError as error:
        raise ConfigError("out", plan.out, f"cannot be written ({error.strerror})") from error
    return trials


def _depth(plan: Plan, name: str) -> int:
    source = plan.variant(name).source
    return 0 if source is None else 1 + _depth(plan, source)


def _check_unchanged(trial: Trial, now: dict[str, Any]) -> None:
    path = trial.path / "trial.json"
    try:
        noted = read_json(path)
        before = now if noted is None else dict(noted["asked"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete that folder, or give another --out") from error
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"variants.{trial.variant}: {key} = {now[key]!r}, but {trial.folder} was begun with "
            f"{before.get(key)!r}; give another --out, or delete that folder"
        )


@dataclass(frozen=True)
class Running:
    """A trial in a process of its own.

    Args:
        trial: what runs.
        process: where.
        gpu: the one that it sees, where there is any.
    """

    trial: Trial
    process: subprocess.Popen[bytes]
    gpu: str | None


class Runner:
    """Runs trials, as many at once as there are jobs.

    Args:
        trials: those first that others start from.
        jobs: processes at once; 0 runs the trials one after the other in this process.
        threads: of each process; None for ``OMP_NUM_THREADS``, or the processors shared out.
    """

    def __init__(self, trials: list[Trial], jobs: int, threads: int | None) -> None:
        self.trials = trials
        self.jobs = jobs
        given = os.environ.get("OMP_NUM_THREADS", "")
        share = (os.cpu_count() or 1) // max(1, jobs)
        self.threads = threads or (int(given) if given.isdecimal() else share) or 1
        self._running: list[Running] = []

    def run(self) -> None:
        """Run what is not finished; a trial that fails is noted and the others go on."""
        finished = {trial.folder for trial in self.trials if trial.result is not None}
        waiting = [trial for trial in self.trials if trial.folder not in finished]
        for trial in waiting:
            (trial.path / "failed.json").unlink(missing_ok=True)
        # A log file needs fewer lines than a terminal.
        every = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
        shape = {"total": len(self.trials), "initial": len(finished), "unit": "run"}
        with tqdm(**shape, desc="ablate", miniters=0, mininterval=every) as bar:
            try:
                while waiting or self._running:
                    waiting = self._start_ready(waiting, finished, bar)
                    if self._running:
                        time.sleep(POLL_SECONDS)
                        self._collect(finished, bar)
                    bar.set_postfix_str(self._stand(), refresh=False)
                    bar.update(0)
            finally:
                self._stop()

    def _start_ready(self, waiting: list[Trial], finished: set[str], bar: Any) -> list[Trial]:
        left = []
        for trial in waiting:
            if trial.source is not None and trial.source not in finished:
                left.append(trial)
            elif trial.source is not None and not Path(trial.source, "trained.json").is_file():
                trial.fail(f"the weights it starts from are missing: {trial.source} failed")
                self._end(trial, finished, bar)
            elif self.jobs == 0:
                bar.set_postfix_str(f"{trial.variant} seed {trial.seed}")
                self._here(trial)
                self._end(trial, finished, bar)
            elif len(self._running) < self.jobs:
                self._running.append(self._worker(trial))
            else:
                left.append(trial)
        return left

    def _worker(self, trial: Trial) -> Running:
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))}
        # In a clone that is not installed, a new process does not know where the packages are.
        places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(places)
        taken = [running.gpu for running in self._running]
        gpu = min(visible_gpus(), key=taken.count, default=None)
        if gpu is not None:
            # Each takes the first of those that it sees.
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", f"{__package__}.worker", trial.folder]
        with (trial.path / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        return Running(trial, process, gpu)

    @staticmethod
    def _here(trial: Trial) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run_trial(trial)
        except Exception:
            logging.getLogger(__name__).debug("%s", trial.folder, exc_info=True)
        finally:
            with (trial.path / "log.txt").open("a") as log:
                log.write(said.getvalue())

    def _collect(self, finished: set[str], bar: Any) -> None:
        ended = [running for running in self._running if running.process.poll() is not None]
        for running in ended:
            self._running.remove(running)
            trial, code = running.trial, running.process.returncode
            if trial.result is None and trial.failure is None:
                trial.fail(f"its process ended with code {code}, see log.txt")
            self._end(trial, finished, bar)

    @staticmethod
    def _end(trial: Trial, finished: set[str], bar: Any) -> None:
        finished.add(trial.folder)
        bar.update()
        if trial.failure is not None:
            bar.write(f"{trial.variant} seed {trial.seed} failed: {trial.failure}")

    def _stand(self) -> str:
        parts = []
        for running in self._running:
            trial = running.trial
            at = read_json(trial.path / "progress.json")
            steps = "" if at is None else f" {at['step']}/{at['of']}"
            parts.append(f"{trial.variant} seed {trial.seed}{steps}")
        return ", ".join(parts)

    def _stop(self) -> None:
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            try:
                running.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        self._running = []


def run_plan(plan: Plan, jobs: int = 1, threads: int | None = None) -> list[Trial]:
    """Run what is left of a plan and write its table into the plan's folder; returns its trials.

    Raises:
        UserError: where the plan cannot work, before anything runs.
    """
    trials = make_trials(plan)
    try:
        with FileLock(Path(plan.out) / ".lock", timeout=0):
            Runner(trials, jobs, threads).run()
            write_outcome(plan, trials)
    except Timeout as error:
        raise UserError(f"out = {plan.out!r}: another ablate is at work there") from error
    return trials
