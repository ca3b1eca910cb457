"""Runs trials as jobs of a SLURM cluster, through submitit.

VARIANT/seed-0/
  slurm.json   the id of the newest job of the trial
  slurm/       the job script, what submitit keeps of the job, and its output

The folder of the plan must be on a disk that all machines of the cluster share.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memorizing_transformers.errors import ConfigError

from .json_files import read_json, write_json
from .processes import environment
from .trial import Trial, run_logged

SUBMITIT = "submitit==1.5.4"
COMMANDS = ("sbatch", "srun", "sacct")
MINUTES = 24 * 60
"""Default time limit of a job."""


class ResumableTrial:
    """The function that a job runs.

    Because of ``checkpoint``, submitit queues the job again at its time limit, at most three times,
    and when it is preempted; the trial then resumes from its newest checkpoint."""

    def __call__(self, trial: Trial) -> None:
        """Run the trial."""
        run_logged(trial)

    def checkpoint(self, trial: Trial) -> Any:
        """What the job runs when it starts again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, trial)


@dataclass(frozen=True)
class SlurmRun:
    """A trial in a SLURM job.

    Args:
        trial: what runs.
        job: submitit's view of its job.
    """

    trial: Trial
    job: Any

    def ended(self) -> bool:
        """Whether the job has ended."""
        if not self.job.done():
            return False
        # A network file system looks for new files when a folder is listed.
        os.listdir(self.trial.folder)
        return True

    def end(self) -> str:
        """How it ended."""
        state = self.job.watcher.get_state(self.job.job_id, mode="force")
        return f"its SLURM job {self.job.job_id} ended ({state}), see log.txt and slurm/"


class SlurmJobs:
    """Runs each trial as a SLURM job of its own.

    If a trial has a job in the queue already, of a runner that was stopped, ``start`` finds it.

    Args:
        jobs: the number of jobs in the queue at the same time. None: all that can start.
        threads: CPU threads of each job. None: ``cpus_per_task``.
        options: options of sbatch by name, with ``_`` for ``-``. ``time`` is in minutes.
        cluster: the name of submitit's executor; tests use ``debug``.

    Raises:
        ConfigError: if submitit or a command of SLURM is missing, or an option is wrong.
    """

    poll_seconds = 2.0

    def __init__(
        self,
        jobs: int | None,
        threads: int | None,
        options: Mapping[str, Any],
        cluster: str = "slurm",
    ) -> None:
        try:
            import submitit
        except ModuleNotFoundError as error:
            remedy = f"needs submitit; pip install {SUBMITIT}"
            raise ConfigError("executor", "slurm", remedy) from error
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        if cluster == "slurm" and missing:
            remedy = f"{missing[0]} was not found; run this on a login node of the cluster"
            raise ConfigError("executor", "slurm", remedy)
        self.jobs = jobs or sys.maxsize
        self.cluster = cluster
        self._submitit = submitit
        self._options = {"time": MINUTES, "cpus_per_task": 1, "setup": [], **options}
        for key, unit in (("time", "minutes"), ("cpus_per_task", "CPU cores")):
            value = self._options[key]
            if type(value) is not int or value < 1:
                raise ConfigError(f"slurm.{key}", value, f"must be a number of {unit}, at least 1")
        setup = self._options["setup"]
        if not isinstance(setup, list) or not all(isinstance(line, str) for line in setup):
            raise ConfigError("slurm.setup", setup, "must be a list of shell commands")
        self.threads = threads or self._options["cpus_per_task"]
        try:
            self._executor(Path(), self._options)
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError("slurm", dict(options), str(error).splitlines()[0]) from error

    def _executor(self, folder: Path, options: Mapping[str, Any]) -> Any:
        """submitit's executor of jobs with these options, which checks their names and types."""
        executor = self._submitit.AutoExecutor(folder, cluster=self.cluster)
        executor.update_parameters(**{f"slurm_{key}": value for key, value in options.items()})
        return executor

    def start(self, trial: Trial, running: Sequence[Any]) -> SlurmRun:
        """Submit a trial, or find the job that already runs it.

        Raises:
            ConfigError: if SLURM refuses the job.
        """
        folder, id_file = trial.path / "slurm", trial.path / "slurm.json"
        known = read_json(id_file)
        if known is not None and self.cluster == "slurm":
            old: Any = self._submitit.SlurmJob(folder, known["job"])
            # SLURM forgets jobs that ended long ago; their state is UNKNOWN.
            if not old.done(force_check=True) and old.state != "UNKNOWN":
                return SlurmRun(trial, old)
        variables = environment(self.threads)
        # Newer versions of srun do not take it from the options of sbatch.
        variables["SRUN_CPUS_PER_TASK"] = str(self._options["cpus_per_task"])
        exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
        own: dict[str, Any] = {"job_name": f"{trial.variant}-{trial.seed}"}
        own["setup"] = [*exports, *self._options["setup"]]
        try:
            job = self._executor(folder, {**self._options, **own}).submit(ResumableTrial(), trial)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise ConfigError("slurm", self._options, "".join(reason)) from error
        write_json(id_file, {"job": job.job_id})
        return SlurmRun(trial, job)

    def stop(self, running: Sequence[Any]) -> None:
        """Leave the jobs in the queue and say so."""
        if running:
            ids = " ".join(run.job.job_id for run in running)
            print(f"SLURM jobs continue; to end them: scancel {ids}", file=sys.stderr)
