"""Which checkpoint ``--ckpt_path`` means, wherever a config saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import Run, command

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.checkpoint.finding import resolve_checkpoint
from memorizing_transformers.training.checkpoint.folder import _seal, read_manifest


def put(run: Run, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another manifest."""
    shutil.copytree(run.checkpoint, target)
    manifest = {**read_manifest(target), **changes}
    file = target / "manifest.json"
    file.write_text(json.dumps({**manifest, "seal": _seal(manifest)}))
    return target


PLACES = [
    "version_3/checkpoints/last.ckpt",
    "version_3/checkpoints/step=60-val/loss=2.40.ckpt",
    "version_3/checkpoints/a/b/c.ckpt",
    "version_3/checkpoints/.last.ckpt.replaced",
    "lightning_logs/version_0/checkpoints/last.ckpt",
    "name/any/checkpoints/last.ckpt",
    "checkpoints/last.ckpt",
    "mine/last.ckpt",
    "hpc_ckpt_1.ckpt",
]


@pytest.mark.parametrize("place", PLACES)
def test_last_is_found_in_every_layout(run: Run, tmp_path: Path, place: str) -> None:
    put(run, tmp_path / "version_0/checkpoints/x.ckpt", written=1, step=1000)
    (tmp_path / "version_4" / "checkpoints").mkdir(parents=True)
    newest = put(run, tmp_path / place, written=2)
    assert resolve_checkpoint("last", tmp_path) == str(newest)


def test_last_is_the_one_written_last_over_all_runs(run: Run, tmp_path: Path) -> None:
    """Also where an earlier run was resumed after a later one."""
    put(run, tmp_path / "version_1/checkpoints/x.ckpt", written=5, step=50)
    newest = put(run, tmp_path / "version_0/checkpoints/x.ckpt", written=6, step=9)
    assert resolve_checkpoint("last", tmp_path) == str(newest)


def test_a_folder_of_checkpoints_may_be_a_link_and_links_may_run_in_circles(
    run: Run, tmp_path: Path
) -> None:
    put(run, tmp_path / "disk" / "x.ckpt", written=5)
    (tmp_path / "runs" / "version_0").mkdir(parents=True)
    (tmp_path / "runs" / "version_0" / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "runs")
    (tmp_path / "disk" / "last.ckpt").symlink_to("x.ckpt")
    found = resolve_checkpoint("last", tmp_path / "runs")
    assert found == str(tmp_path / "runs" / "version_0" / "checkpoints" / "x.ckpt")


def test_runs_of_a_root_below_are_not_ours(run: Run, tmp_path: Path) -> None:
    ours = put(run, tmp_path / "version_0/checkpoints/x.ckpt", written=1)
    theirs = put(run, tmp_path / "other/version_0/checkpoints/x.ckpt", written=2)
    settings = {"trainer": {"default_root_dir": "moved/from/other"}}
    (tmp_path / "other/version_0/config.yaml").write_text(yaml.safe_dump(settings))
    assert resolve_checkpoint("last", tmp_path) == str(ours)
    assert resolve_checkpoint("last", tmp_path / "other") == str(theirs)


def test_training_needs_more_than_weights(run: Run, tmp_path: Path) -> None:
    whole = put(run, tmp_path / "version_0/checkpoints/a.ckpt", written=1)
    weights = put(run, tmp_path / "version_0/checkpoints/b.ckpt", written=2, weights_only=True)
    assert resolve_checkpoint("last", tmp_path) == str(whole)
    for command_ in ("test", "validate", "predict"):
        assert resolve_checkpoint("last", tmp_path, command_) == str(weights)
        assert resolve_checkpoint(str(weights), tmp_path, command_) == str(weights)
    with pytest.raises(ConfigError, match="weights only"):
        resolve_checkpoint(str(weights), tmp_path)
    shutil.rmtree(whole)
    with pytest.raises(ConfigError, match="weights only") as told:
        resolve_checkpoint("last", tmp_path)
    assert str(weights) in str(told.value)


def test_a_folder_or_a_file_of_a_checkpoint_means_the_checkpoint(run: Run, tmp_path: Path) -> None:
    put(run, tmp_path / "version_0/checkpoints/a.ckpt", written=1)
    new = put(run, tmp_path / "version_0/checkpoints/val/b.ckpt", written=2)
    folder = tmp_path / "version_0"
    for given in (new, f"{new}/", new / "trainer.ckpt", new / "manifest.json", folder,
                  folder / "checkpoints", f"{folder}/checkpoints/", new.parent):  # fmt: skip
        assert resolve_checkpoint(str(given), tmp_path / "nowhere") == str(new)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ([], "version_N/checkpoints"),
        (["--trainer.logger=false"], "runs/checkpoints"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=DIR"], "DIR/lightning_logs"),
    ],
)
def test_where_nothing_is_found_the_line_says_where_the_config_saves(
    config: Path, tmp_path: Path, arguments: list[str], place: str
) -> None:
    there = str(tmp_path / "logs")
    given = [argument.replace("DIR", there) for argument in arguments]
    code, _, err = command("fit", "--config", config, *given, "--ckpt_path", "last")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert place.replace("DIR", there) in line
    assert "leave it out" not in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.logger=false"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=OUT"],
    ],
)
def test_what_a_config_has_saved_it_resumes(
    config: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """Wherever: below the root or elsewhere."""
    out = tmp_path / "elsewhere"
    settings = yaml.safe_load(config.read_text())
    keep = {"filename": "{step}-{val/loss:.2f}", "monitor": "val/loss"}
    settings["trainer"]["callbacks"][0]["init_args"] = keep
    config.write_text(yaml.safe_dump(settings))
    given = ["fit", "--config", config, "--final_report", "false"]
    given += [argument.replace("OUT", str(out)) for argument in arguments]
    assert command(*given, "--trainer.max_steps", 8)[0] == 0
    code, said, err = command(*given, "--trainer.max_steps", 9, "--ckpt_path", "last")
    assert code == 0, err
    assert "at step 9" in said


def test_refused_starts_leave_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    """Neither an empty run folder nor another config in a folder that is there."""
    root = tmp_path / "runs"
    shutil.copytree(run.root / "version_0", root / "version_0")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    checkpoint = root / "version_0" / "checkpoints" / "last.ckpt"
    for arguments in (
        ("--ckpt_path", checkpoint, "--model.d_model", 32),
        ("--ckpt_path", run.checkpoint, "--model.d_model", 32),
        ("--ckpt_path", tmp_path / "empty"),
        ("--ckpt_path", "best"),
        ("--data.batch_rows", 3, "--ckpt_path", checkpoint),
    ):
        code, _, _ = command("fit", "--config", config, *arguments)
        assert code == 2, arguments
        for path, content in before.items():
            assert path.read_bytes() == content, (arguments, path)
        assert [path.name for path in root.iterdir()] == ["version_0"], arguments
    code, _, _ = command("test", "--config", config, "--ckpt_path", "last", "--model.d_model", 32)
    assert code == 2
    assert [path.name for path in root.iterdir()] == ["version_0"]
