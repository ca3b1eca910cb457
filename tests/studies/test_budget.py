"""A budget of tokens becomes the number of steps that read them, whatever a step reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from plans import write_plan

from memorizing_studies.ablation.plan import build
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_studies.ablation.runner import make_trials
from memorizing_studies.ablation.trial import train
from memorizing_transformers.errors import UserError

ACCUMULATE = "trainer.accumulate_grad_batches"
SHAPES = [(1, 4, 16), (2, 4, 16), (3, 1, 5), (7, 4, 5), (5, 2, 16)]


def steps(folder: Path, base: Path, overrides: dict[str, Any], /, **plan: Any) -> int:
    """The steps of a variant with these overrides."""
    variants = [{"name": "x", "overrides": overrides}]
    loaded = load_plan(write_plan(folder / "plan.yaml", base, folder, variants=variants, **plan))
    found = build(loaded, loaded.variant("x"), 0)[1]
    assert found["trainer.max_time"] is None
    return int(found["trainer.max_steps"])


@pytest.mark.parametrize(("accumulate", "rows", "segment"), SHAPES)
def test_steps_are_the_budget_over_what_a_step_reads(
    accumulate: int, rows: int, segment: int, base: Path, tmp_path: Path
) -> None:
    shape = {ACCUMULATE: accumulate, "data.batch_rows": rows, "data.segment_length": segment}
    places = accumulate * rows * segment
    for budget in (places, 6 * places - 1):
        found = steps(tmp_path, base, shape, budget={"tokens": budget})
        assert found * places <= budget < (found + 1) * places
    with pytest.raises(UserError, match=rf"budget\.tokens = {places - 1}: .*\({places}\)"):
        steps(tmp_path, base, shape, budget={"tokens": places - 1})


def test_accumulation_counts_wherever_it_is_set(base: Path, tmp_path: Path) -> None:
    budget = {"tokens": 24 * 64}
    config = yaml.safe_load(base.read_text())
    config["trainer"]["accumulate_grad_batches"] = 4
    accumulating = tmp_path / "base.yaml"
    accumulating.write_text(yaml.safe_dump(config))
    of_plan = {ACCUMULATE: 4}
    assert steps(tmp_path, base, {}, budget=budget) == 24
    assert steps(tmp_path, base, of_plan, budget=budget) == 6
    assert steps(tmp_path, base, {}, budget=budget, overrides=of_plan) == 6
    assert steps(tmp_path, accumulating, {}, budget=budget) == 6
    assert steps(tmp_path, accumulating, {ACCUMULATE: 3}, budget=budget) == 8


def test_devices_of_the_base_do_not_matter(base: Path, tmp_path: Path) -> None:
    """Rows are counted over all devices, and a variant runs on one."""
    config = yaml.safe_load(base.read_text())
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    assert steps(tmp_path, tmp_path / "base.yaml", {}, budget={"tokens": 24 * 64}) == 24


def test_variants_that_differ_in_accumulation_read_the_same_tokens(
    base: Path, tmp_path: Path
) -> None:
    variants = [{"name": f"x{k}", "overrides": {ACCUMULATE: k}} for k in (2, 4)]
    changes = {"variants": variants, "budget": {"tokens": 8 * 64}}
    plan = load_plan(write_plan(tmp_path / "plan.yaml", base, tmp_path / "out", **changes))
    figures = [train(trial)["figures"] for trial in make_trials(plan)]
    assert [one["train_steps"] for one in figures] == [8, 4, 2]
    assert len({one["train_tokens"] for one in figures}) == 1
    assert figures[0]["train_tokens"] <= 8 * 64


SCHEDULER = {
    "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
    "init_args": {"scheduling": {0: 2}},
}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"trainer.callbacks": [SCHEDULER]}, "trainer.accumulate_grad_batches"),
        ({"trainer.fast_dev_run": True}, "trainer.fast_dev_run = True"),
        ({"trainer.fast_dev_run": 2}, "trainer.fast_dev_run = 2"),
    ],
)
def test_settings_that_break_the_budget_are_refused(
    overrides: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        steps(tmp_path, base, overrides)


@pytest.mark.parametrize(("key", "value"), [("max_epochs", 0), ("max_time", "00:00:01:00")])
def test_a_base_with_another_limit_is_refused(
    key: str, value: object, base: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(base.read_text())
    config["trainer"][key] = value
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=rf"trainer\.{key} = {value!r}"):
        steps(tmp_path, tmp_path / "base.yaml", {})
