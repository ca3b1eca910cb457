"""Runs as SLURM jobs. No test has a cluster: SLURM's commands are fakes, see ``fake_slurm``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_slurm
import pytest
from plans import results, rows, write_plan

from memorizing_studies.ablation import slurm
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_studies.ablation.runner import make_executor, make_trials, run_plan
from memorizing_studies.ablation.slurm import ResumableTrial, SlurmJobs
from memorizing_studies.ablation.trial import Trial
from memorizing_transformers.errors import ConfigError, UserError

pytest.importorskip("submitit")

ROOT = Path(__file__).parent.parent.parent
BUDGET = {"tokens": 2 * 64}
EVALUATED: list[dict[str, Any]] = [
    {"name": "larger", "overrides": {"model.memory.size": 64}, "run": "evaluate"},
]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a SLURM whose jobs run on this machine."""
    home = fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setattr(SlurmJobs, "poll_seconds", 0.2)
    return home


def trial_in(folder: Path, name: str = "x") -> Trial:
    (folder / name).mkdir(parents=True, exist_ok=True)
    return Trial(name, 0, str(folder / name), "", {}, {}, True, None, "test")


@pytest.mark.slow
def test_a_plan_runs_as_jobs_and_leaves_the_files_of_a_local_one(
    cluster: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    variants = [
        *EVALUATED,
        {"name": "misfit", "overrides": {"data.tokenizer": "bpe"}, "from": "base"},
    ]
    plan = write_plan(tmp_path / "plan.yaml", base, out, variants=variants, budget=BUDGET)
    options = {"partition": "small", "cpus_per_task": 3, "additional_parameters": {"nice": 9}}
    trials = run_plan(load_plan(plan), make_executor("slurm", None, None, options))
    failed = {trial.variant for trial in trials if trial.failure is not None}
    assert failed == {"misfit"}
    assert set(results(out)) == {"base", "larger"}
    assert "another tokenizer" in rows(out / "table.csv")["misfit"]["failures"]
    folder = out / "base" / "seed-0"
    assert {"result.json", "trained.json", "documents.json", "version_0", "log.txt"} <= {
        path.name for path in folder.iterdir()
    }
    scripts = [path.read_text() for path in cluster.glob("*.sh")]
    assert len(scripts) == 3
    for script in scripts:
        for line in ("--partition=small", "--cpus-per-task=3", "--nice=9", "--time=1440"):
            assert f"#SBATCH {line}\n" in script
        assert "export OMP_NUM_THREADS=3\n" in script
        assert "export PYTHONPATH=" in script
        assert "export SRUN_CPUS_PER_TASK=3\n" in script
        assert "--gpus" not in script


def test_jobs_of_a_killed_runner_are_found_again(cluster: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", base, out, variants=EVALUATED, budget=BUDGET)
    command = ["ablate", "--plan", str(plan), "--executor", "slurm"]
    process = subprocess.Popen(
        [sys.executable, "-m", "memorizing_transformers", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (out / "base" / "seed-0" / "slurm.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert results(out) == {}
    run_plan(load_plan(plan), make_executor("slurm", 1, None, {"time": 5}))
    assert set(results(out)) == {"base", "larger"}
    # One job for each trial: the base's is that of the runner that was killed.
    scripts = [path.read_text() for path in sorted(cluster.glob("*.sh"))]
    assert ["--time=1440\n" in script for script in scripts] == [True, False]


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_queued_again_and_resumes(
    cluster: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", base, out, budget={"tokens": 80 * 64})
    trial = make_trials(load_plan(plan))[0]
    run = SlurmJobs(1, None, {}).start(trial, [])
    deadline = time.monotonic() + 300
    while not [*trial.path.glob("version_0/checkpoints/*.ckpt/manifest.json")]:
        assert time.monotonic() < deadline
        assert not run.ended()
        time.sleep(0.02)
    os.kill(int((cluster / "newest.pid").read_text()), signal.SIGUSR2)
    while not run.ended():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert trial.failure is None
    assert trial.result is not None
    assert trial.result["train_steps"] == 80
    # One job, which began twice and trained in one folder.
    assert len([*cluster.glob("*.sh")]) == 1
    assert not (trial.path / "version_1").exists()
    printed = "".join(path.read_text() for path in trial.path.glob("slurm/*_log.*"))
    assert printed.count("Loading pickle") == 2


@pytest.mark.parametrize(
    ("state", "submitted"), [("PENDING", 0), ("RUNNING", 0), ("CANCELLED by 7", 1), (None, 1)]
)
def test_a_job_is_submitted_again_only_if_none_is_left(
    state: str | None, submitted: int, cluster: Path, tmp_path: Path
) -> None:
    trial = trial_in(tmp_path)
    job = str(time.time_ns())
    (trial.path / "slurm.json").write_text(json.dumps({"job": job}))
    if state is not None:
        (cluster / f"{job}.state").write_text(state)
    run = SlurmJobs(1, None, {}).start(trial, [])
    assert len([*cluster.glob("*.sh")]) == submitted
    assert (run.job.job_id == job) == (not submitted)


def test_a_job_that_dies_has_failed(cluster: Path, tmp_path: Path) -> None:
    trial = trial_in(tmp_path)
    job = str(time.time_ns())
    (trial.path / "slurm.json").write_text(json.dumps({"job": job}))
    (cluster / f"{job}.state").write_text("RUNNING")
    run = SlurmJobs(1, None, {}).start(trial, [])
    assert not run.ended()
    (cluster / f"{job}.state").write_text("OUT_OF_MEMORY")
    run.job.watcher.clear()
    assert run.ended()
    assert f"SLURM job {job} ended (OUT_OF_MEMORY)" in run.end()


def test_a_job_that_slurm_refuses_is_one_line(cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^slurm = .*none.*Invalid partition name specified$"):
        SlurmJobs(1, None, {"partition": "none"}).start(trial_in(tmp_path), [])


def test_jobs_are_left_in_the_queue(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    runs = [SimpleNamespace(job=SimpleNamespace(job_id=name)) for name in ("5", "6")]
    SlurmJobs(1, None, {}).stop(runs)
    assert "scancel 5 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"partion": "gpu"},
            r"slurm = .*partion.*: Unknown argument 'partion'.*Valid arguments: .*partition",
        ),
        ({"time": "1-00:00:00"}, r"slurm\.time = '1-00:00:00': must be .*minutes"),
        ({"cpus_per_task": 0}, r"slurm\.cpus_per_task = 0"),
        ({"additional_parameters": 3}, r"slurm = \{'additional_parameters': 3\}: "),
        ({"setup": "module load cuda"}, r"slurm\.setup = .*list"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str, cluster: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        make_executor("slurm", None, None, options)


def test_submitit_has_one_version() -> None:
    for name in ("requirements-dev.txt", "pyproject.toml"):
        assert slurm.SUBMITIT in (ROOT / name).read_text()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"executor = 'slurm': sbatch was not found"):
        make_executor("slurm", None, None, None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=rf"executor = 'slurm': .*pip install {slurm.SUBMITIT}"):
        make_executor("slurm", None, None, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("local", -1, None, None), "jobs = -1"),
        (("slurm", 0, None, None), "jobs = 0"),
        (("local", 1, 0, None), "threads = 0"),
        (("local", 1, None, {"time": 3}), "slurm = .*executor=slurm"),
    ],
)
def test_wrong_executors_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_executor(*given)


def test_submitit_runs_a_trial_and_can_queue_it_again(base: Path, tmp_path: Path) -> None:
    """In this process, by submitit's own executor for debugging."""
    plan = write_plan(tmp_path / "plan.yaml", base, tmp_path / "out", budget=BUDGET)
    trial = make_trials(load_plan(plan))[0]
    executor = SlurmJobs(1, None, {}, cluster="debug")
    run = executor.start(trial, [])
    assert run.job.exception() is None
    assert run.ended()
    assert trial.result is not None
    again = ResumableTrial().checkpoint(trial)
    assert again.function.__class__ is ResumableTrial
    assert again.args == (trial,)
