"""A plan from start to table. One that is killed and resumed gives the same figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from plans import VARIANTS, results, rows, write_plan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memorizing_studies.ablation import processes, trial
from memorizing_studies.ablation import runner as ablate
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_studies.ablation.processes import ThisProcess
from memorizing_studies.ablation.trial import Trial
from memorizing_transformers.__main__ import main
from memorizing_transformers.errors import UserError

ROOT = Path(__file__).parent.parent.parent
EXACT = ("perplexity", "bits_per_byte", "accuracy", "loss", "tokens", "train_steps", "recall")
"""Figures that do not depend on time."""


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan that ran without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    plan = write_plan(folder / "plan.yaml", base, folder / "out")
    ablate.run_plan(load_plan(plan), ThisProcess())
    return folder / "out"


def test_ends_with_table_plot_and_hparams(uninterrupted: Path) -> None:
    table = (uninterrupted / "table.md").read_text()
    for name in ("base", *(variant["name"] for variant in VARIANTS)):
        assert f"| {name} |" in table
    assert (uninterrupted / "plot.png").stat().st_size > 1000
    assert len(list(uninterrupted.glob("*/*/texts.json"))) == 1 + len(VARIANTS)
    found = rows(uninterrupted / "table.csv")
    base, control = found["base"], found["no-memory"]
    gap = float(control["loss"]) - float(base["loss"])
    assert float(control["loss_difference"]) == pytest.approx(gap, abs=1e-5)
    assert 0 < float(control["p_value"]) <= 1
    assert float(base["train_step_ms_relative"]) == 1
    assert base["recall"] == "1.0"
    assert control["recall"] == control["eval_search_ms"] == ""
    events = EventAccumulator(str(uninterrupted / "tensorboard" / "base" / "seed-0"))
    events.Reload()
    assert "ablation/perplexity" in events.Tags()["scalars"]


def test_another_variant_can_be_the_reference(uninterrupted: Path) -> None:
    plan = replace(load_plan(uninterrupted.parent / "plan.yaml"), reference="no-memory")
    ablate.write_outcome(plan, ablate.make_trials(plan))
    found = rows(uninterrupted / "table.csv")
    assert "against no-memory" in (uninterrupted / "table.md").read_text()
    assert found["no-memory"]["loss_difference"] == ""
    gap = float(found["base"]["loss"]) - float(found["no-memory"]["loss"])
    assert float(found["base"]["loss_difference"]) == pytest.approx(gap, abs=1e-5)
    assert float(found["no-memory"]["train_step_ms_relative"]) == 1
    plan = replace(plan, reference="base")
    ablate.write_outcome(plan, ablate.make_trials(plan))


def test_evaluation_sees_the_same_tokens_and_training_the_same_budget(uninterrupted: Path) -> None:
    marks = [
        {name: (sums[0], sums[2]) for name, sums in json.loads(path.read_text()).items()}
        for path in uninterrupted.glob("*/*/documents.json")
    ]
    assert len(marks) == 4
    assert all(mark == marks[0] for mark in marks)
    steps = {name: found.get("train_steps") for name, found in results(uninterrupted).items()}
    assert steps == {"base": 24, "no-memory": 24, "larger": None, "retrofit": 8}


def test_variants_begin_with_the_weights_that_they_name(uninterrupted: Path) -> None:
    loss = {name: found["loss"] for name, found in results(uninterrupted).items()}
    # Eight steps from new weights would give a much higher loss.
    assert loss["retrofit"] < loss["no-memory"] + 0.05
    assert loss["larger"] != loss["base"]
    assert loss["larger"] == pytest.approx(loss["base"], abs=0.1)


def test_a_variant_that_fails_is_reported_and_the_others_run(uninterrupted: Path) -> None:
    row = rows(uninterrupted / "table.csv")["broken"]
    assert "another tokenizer" in row["failures"]
    assert row["perplexity"] == ""
    assert row["failures"] in (uninterrupted / "table.md").read_text()


def test_finished_variants_never_run_again(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def fail(trial: Trial) -> None:
        ran.append(trial.variant)
        trial.fail("tried again")

    monkeypatch.setattr(processes, "run_logged", fail)
    before = results(uninterrupted)
    ablate.run_plan(load_plan(uninterrupted.parent / "plan.yaml"), ThisProcess())
    assert ran == ["broken"]
    assert results(uninterrupted) == before


def test_the_command_exits_with_1_after_failures(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = uninterrupted.parent / "plan.yaml"
    command = ["ablate", "--plan", str(plan), "--jobs", "0"]
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", *command])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 1


def test_a_trial_that_finished_has_not_failed(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    # As a process leaves it that outlived its runner, after a second process gave up its trial.
    (out / "base" / "seed-0" / "failed.json").write_text('{"reason": "another process"}')
    (out / "larger" / "seed-0" / "result.json").unlink()
    trials = ablate.run_plan(
        load_plan(uninterrupted.parent / "plan.yaml", out=str(out)), ThisProcess()
    )
    assert {trial.variant for trial in trials if trial.failure is not None} == {"broken"}
    assert (
        rows(out / "table.csv")["larger"]["loss"]
        == rows(uninterrupted / "table.csv")["larger"]["loss"]
    )


def test_a_changed_plan_does_not_resume_in_the_same_folder(uninterrupted: Path) -> None:
    plan = load_plan(uninterrupted.parent / "plan.yaml", {"model.d_model": 32})
    with pytest.raises(UserError, match=r"variants\.base: model\.d_model = 32.*16"):
        ablate.run_plan(plan, ThisProcess())


def test_a_killed_plan_continues_to_the_same_figures(
    uninterrupted: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", base, out)
    command = [sys.executable, "-m", "memorizing_transformers", "ablate", "--plan", str(plan)]
    process = subprocess.Popen(
        [*command, "--jobs", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # In the second variant: it has a checkpoint, and is not evaluated.
    begun = out / "no-memory" / "seed-0" / "version_0" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(begun.glob("*.ckpt/manifest.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert set(results(out)) == {"base"}
    finished = (out / "base" / "seed-0" / "result.json").stat().st_mtime_ns

    ablate.run_plan(load_plan(plan), ThisProcess())
    assert (out / "base" / "seed-0" / "result.json").stat().st_mtime_ns == finished
    assert not (out / "no-memory" / "seed-0" / "version_1").exists()
    ours, theirs = results(out), results(uninterrupted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        for key in EXACT:
            assert ours[name].get(key) == theirs[name].get(key), (name, key)


@pytest.mark.slow
def test_a_budget_of_minutes_saves_its_end(base: Path, tmp_path: Path) -> None:
    """Two seeds are two runs, and the table has their standard deviation."""
    config = yaml.safe_load(base.read_text())
    config["trainer"] |= {"max_steps": 1_000_000, "val_check_interval": 1_000_000}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    plan = write_plan(
        tmp_path / "plan.yaml",
        tmp_path / "base.yaml",
        tmp_path / "out",
        variants=[VARIANTS[1]],
        seeds=[0, 1],
        budget={"minutes": 0.05},
    )
    ablate.run_plan(load_plan(plan), ThisProcess())
    out = tmp_path / "out"
    assert float(rows(out / "table.csv")["base"]["perplexity_std"]) > 0
    for found in out.glob("base/*/result.json"):
        assert 1 < json.loads(found.read_text())["train_seconds"] < 6
    assert len(list(out.glob("*/*/result.json"))) == 4


@pytest.mark.slow
def test_training_that_ends_early_has_failed(base: Path, tmp_path: Path) -> None:
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "train/loss", "divergence_threshold": 0.0, "strict": False},
    }
    callbacks = [*yaml.safe_load(base.read_text())["trainer"].get("callbacks", []), stop]
    plan = write_plan(
        tmp_path / "plan.yaml",
        base,
        tmp_path / "out",
        variants=[{"name": "early", "overrides": {"trainer.callbacks": callbacks}}],
    )
    trials = ablate.run_plan(load_plan(plan), ThisProcess())
    failures = {trial.variant: trial.failure for trial in trials}
    assert failures["base"] is None
    assert "of 24" in str(failures["early"])


def test_weights_without_a_finite_loss_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = MagicMock()
    cli.trainer.callbacks = []
    cli.trainer.test.return_value = [{"test/loss": math.nan}]
    monkeypatch.setattr(trial, "TrialCLI", lambda *args, **kwargs: cli)
    monkeypatch.setattr(trial, "Evaluation", MagicMock())
    asked = Trial("x", 0, "out/x/seed-0", "", {}, {}, False, "out/base/seed-0", "test")
    with pytest.raises(UserError, match="loss = nan"):
        trial.evaluate(asked, Path())
