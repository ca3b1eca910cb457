"""A plan's folder must hold results of the same plan and of the same texts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from plans import VARIANTS, write_plan

from memorizing_studies.ablation import runner as ablate
from memorizing_studies.ablation.json_files import read_json, write_json
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_studies.ablation.trial_callbacks import SameTexts
from memorizing_transformers.errors import UserError


def test_a_changed_source_changes_the_variants_that_start_from_it(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = write_plan(tmp_path / "plan.yaml", base, out)
    ablate.make_trials(load_plan(plan))
    faster = {"model.memory.layers": [], "model.optimizer.lr": 0.5}
    changed = [{**VARIANTS[0], "overrides": faster}, *VARIANTS[1:]]
    plan = write_plan(tmp_path / "plan.yaml", base, out, variants=changed)
    shutil.rmtree(out / "no-memory")
    with pytest.raises(UserError, match=r"variants\.retrofit: from\.model\.optimizer\.lr = 0\.5"):
        ablate.make_trials(load_plan(plan))
    shutil.rmtree(out / "retrofit")
    ablate.make_trials(load_plan(plan))


def test_a_folder_that_moved_is_the_same(base: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.yaml", base, tmp_path / "out")
    for trial in ablate.make_trials(load_plan(plan)):
        write_json(trial.path / "result.json", {"loss": len(trial.variant)})
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = ablate.make_trials(load_plan(plan, out=str(tmp_path / "moved")))
    assert len(moved) == 1 + len(VARIANTS)
    for trial in moved:
        assert trial.result == {"loss": len(trial.variant)}
        assert trial.path == tmp_path / "moved" / trial.variant / "seed-0"
        if trial.source is not None:
            assert Path(trial.source).parent.parent == tmp_path / "moved"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_an_older_version_had_the_defaults_of_keys_that_came_later(
    base: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "plan.yaml", base, tmp_path / "out")
    ablate.make_trials(load_plan(plan))

    def forget(key: str) -> None:
        for file in (tmp_path / "out").rglob("trial.json"):
            trial = read_json(file)
            asked = {k: v for k, v in trial["asked"].items() if k.removeprefix("from.") != key}
            assert len(asked) < len(trial["asked"])
            write_json(file, {**trial, "asked": asked})

    forget("model.activation")
    ablate.make_trials(load_plan(plan))
    forget("model.optimizer.lr")
    with pytest.raises(UserError, match=r"lr = 0\.01, .* was started with 0\.001"):
        ablate.make_trials(load_plan(plan))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"asked": 1}'])
def test_a_damaged_trial_file_is_named(base: Path, tmp_path: Path, content: str) -> None:
    plan = write_plan(tmp_path / "plan.yaml", base, tmp_path / "out")
    ablate.make_trials(load_plan(plan))
    file = tmp_path / "out" / "base" / "seed-0" / "trial.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(file))):
        ablate.make_trials(load_plan(plan))


def test_a_folder_that_cannot_be_written_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("no folder")
    plan = write_plan(tmp_path / "plan.yaml", base, tmp_path / "out")
    with pytest.raises(UserError, match="out = "):
        ablate.make_trials(load_plan(plan))


def test_texts_that_changed_are_refused(tmp_path: Path) -> None:
    def read(variant: str, settings: str, store: str) -> None:
        folder = tmp_path / variant / "seed-0"
        folder.mkdir(parents=True, exist_ok=True)
        data = MagicMock(store_folder=Path(store))
        data.settings.__repr__ = lambda _: settings
        SameTexts(folder).setup(MagicMock(datamodule=data), None, "fit")

    read("base", "novels", "a")
    read("other", "novels", "a")
    read("again", "poems", "b")
    read("base", "novels", "a")
    with pytest.raises(UserError, match="since base/seed-0 read them"):
        read("new", "novels", "c")
    assert not (tmp_path / "new" / "seed-0" / "texts.json").exists()
