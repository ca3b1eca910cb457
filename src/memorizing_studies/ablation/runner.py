"""Runs the trials of a plan. A trial that has finished never runs again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from tqdm import tqdm

from memorizing_transformers.errors import ConfigError, UserError

from .json_files import read_json
from .plan import Plan, check, defaults
from .processes import Processes, ThisProcess
from .slurm import SlurmJobs
from .table import write_outcome
from .trial import Trial

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Seconds between two updates of the progress bar."""


def make_trials(plan: Plan) -> list[Trial]:
    """All trials, each after the trial that it starts from, and each written to its folder.

    Raises:
        UserError: if a config cannot work, a folder holds a trial of another config, or the plan's
            folder cannot be written.
    """
    out, trials = Path(plan.out), []
    order = sorted(plan.variants, key=lambda variant: _depth(plan, variant.name))
    configs = check(plan)
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
        known = defaults(plan)
        known |= {f"from.{key}": value for key, value in known.items()}
        for trial in trials:
            _check_unchanged(trial, asked[trial.variant, trial.seed], known)
        for trial in trials:
            trial.save(asked[trial.variant, trial.seed])
    except OSError as error:
        raise ConfigError("out", plan.out, f"cannot be written ({error.strerror})") from error
    return trials


def _depth(plan: Plan, name: str) -> int:
    """How many other trials a trial needs first."""
    source = plan.variant(name).source
    return 0 if source is None else 1 + _depth(plan, source)


def _check_unchanged(trial: Trial, now: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse a folder of other settings; what an older version did not ask had its default."""
    path = trial.path / "trial.json"
    try:
        found = read_json(path)
        before = now if found is None else {**known, **found["asked"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete that folder, or give another --out") from error
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"variants.{trial.variant}: {key} = {now[key]!r}, but {trial.folder} was started with "
            f"{before.get(key)!r}; give another --out, or delete that folder"
        )


class Run(Protocol):
    """A trial that an executor has started."""

    @property
    def trial(self) -> Trial:
        """The trial."""

    def ended(self) -> bool:
        """Whether it has ended."""

    def end(self) -> str:
        """How it ended, for a trial that has written neither a result nor a failure."""


class Executor(Protocol):
    """Where trials run: ``ThisProcess``, ``Processes`` or ``SlurmJobs``."""

    jobs: int
    """The number of trials at the same time."""
    poll_seconds: float
    """Seconds between two checks for trials that have ended."""

    def start(self, trial: Trial, running: Sequence[Any]) -> Run:
        """Start a trial; ``running`` are those that run already."""

    def stop(self, running: Sequence[Any]) -> None:
        """End, or leave, the trials that run when the runner stops."""


class Runner:
    """Runs trials, as many at the same time as the executor allows.

    Args:
        trials: each after the trial whose weights it starts from.
        executor: where they run.
    """

    def __init__(self, trials: list[Trial], executor: Executor) -> None:
        self.trials = trials
        self.executor = executor
        self._running: list[Run] = []
        self._finished = {trial.folder for trial in trials if trial.result is not None}

    def run(self) -> None:
        """Run the trials that are not finished. If one fails, the others still run."""
        waiting = [trial for trial in self.trials if trial.folder not in self._finished]
        for trial in waiting:
            (trial.path / "failed.json").unlink(missing_ok=True)
        # A log file needs fewer lines than a terminal.
        every = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
        shape = {"total": len(self.trials), "initial": len(self._finished), "unit": "run"}
        with tqdm(**shape, desc="ablate", miniters=0, mininterval=every) as bar:
            try:
                while waiting or self._running:
                    waiting = [trial for trial in waiting if not self._start(trial, bar)]
                    bar.set_postfix_str(self._progress(), refresh=False)
                    bar.update(0)
                    if self._running:
                        time.sleep(self.executor.poll_seconds)
                        self._collect(bar)
            finally:
                self.executor.stop(self._running)

    def _start(self, trial: Trial, bar: Any) -> bool:
        """Start a trial, or let it fail if its source failed; False if it has to wait."""
        if trial.source is not None and trial.source not in self._finished:
            return False
        if trial.source is not None and not Path(trial.source, "trained.json").is_file():
            trial.fail(f"the weights it starts from are missing: {trial.source} failed")
            self._end(trial, bar)
        elif len(self._running) >= self.executor.jobs:
            return False
        else:
            bar.set_postfix_str(f"{trial.variant} seed {trial.seed}")
            self._running.append(self.executor.start(trial, self._running))
        return True

    def _collect(self, bar: Any) -> None:
        for run in [run for run in self._running if run.ended()]:
            self._running.remove(run)
            if run.trial.result is None and run.trial.failure is None:
                run.trial.fail(run.end())
            self._end(run.trial, bar)

    def _end(self, trial: Trial, bar: Any) -> None:
        self._finished.add(trial.folder)
        bar.update()
        if trial.failure is not None:
            bar.write(f"{trial.variant} seed {trial.seed} failed: {trial.failure}")

    def _progress(self) -> str:
        parts = []
        for run in self._running:
            at = read_json(run.trial.path / "progress.json")
            steps = "" if at is None else f" {at['step']}/{at['of']}"
            parts.append(f"{run.trial.variant} seed {run.trial.seed}{steps}")
        return ", ".join(parts)


def make_executor(
    name: str, jobs: int | None, threads: int | None, slurm: Mapping[str, Any] | None
) -> Executor:
    """The executor that the command line asks for.

    Args:
        name: ``local`` or ``slurm``.
        jobs: the number of trials at the same time; 0 for one after the other in this process.
        threads: CPU threads of each trial.
        slurm: options of sbatch.

    Raises:
        ConfigError: naming what cannot work.
    """
    least = 1 if name == "slurm" else 0
    if jobs is not None and jobs < least:
        raise ConfigError("jobs", jobs, f"must be at least {least} with executor={name}")
    if threads is not None and threads < 1:
        raise ConfigError("threads", threads, "must be at least 1")
    if name == "slurm":
        return SlurmJobs(jobs, threads, slurm or {})
    if slurm is not None:
        raise ConfigError("slurm", slurm, "needs executor=slurm")
    return ThisProcess() if jobs == 0 else Processes(jobs or 1, threads)


def run_plan(plan: Plan, executor: Executor) -> list[Trial]:
    """Run what is left of a plan and write its table into the plan's folder; returns its trials.

    Raises:
        UserError: if the plan cannot work, before anything runs.
    """
    trials = make_trials(plan)
    try:
        with FileLock(Path(plan.out) / ".lock", timeout=0):
            Runner(trials, executor).run()
            write_outcome(plan, trials)
    except Timeout as error:
        raise UserError(f"out = {plan.out!r}: another ablate runs this plan") from error
    return trials
