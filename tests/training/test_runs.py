"""Which folder a run lives in, and which checkpoint ``last`` is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small import Run

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.runs import resolve_checkpoint, run_folder, versions


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    make(tmp_path, "version_10", "version_9", "version_0", "version_", "version_1b", "test")
    names = [path.name for path in versions(tmp_path)]
    assert names == ["version_0", "version_9", "version_10"]
    assert versions(tmp_path / "nowhere") == []


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_command_begins_a_folder_of_its_own(tmp_path: Path, command: str) -> None:
    root = tmp_path if command == "fit" else tmp_path / command
    assert run_folder(tmp_path, command, None) == root / "version_0"
    make(root, "version_0", "version_11")
    assert run_folder(tmp_path, command, None) == root / "version_12"


def test_a_resumed_run_goes_on_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "runs/version_0/checkpoints/a.ckpt", "runs/version_1")
    monkeypatch.chdir(tmp_path)
    run = Path("runs/version_0")
    for path in ("runs/version_0/checkpoints/a.ckpt", "runs/../runs/version_0/checkpoints/a.ckpt"):
        assert run_folder(Path("runs"), "fit", path) == run
        assert run_folder(Path("runs"), "fit", str(tmp_path / path)) == run
        assert run_folder(tmp_path / "runs", "fit", path) == tmp_path / run
        # A test of it is another run.
        assert run_folder(Path("runs"), "test", path) == Path("runs/test/version_0")


def test_a_checkpoint_from_elsewhere_begins_a_new_folder(tmp_path: Path) -> None:
    make(tmp_path, "runs/version_0", "other/version_0/checkpoints/a.ckpt")
    elsewhere = str(tmp_path / "other/version_0/checkpoints/a.ckpt")
    assert run_folder(tmp_path / "runs", "fit", elsewhere) == tmp_path / "runs/version_1"


def test_last_is_the_newest_checkpoint_of_the_newest_run_that_has_one(
    run: Run, tmp_path: Path
) -> None:
    for version in ("version_2", "version_10"):
        shutil.copytree(run.folder / "checkpoints", tmp_path / version / "checkpoints")
    make(tmp_path, "version_11/checkpoints", "version_12")
    found = Path(resolve_checkpoint("last", tmp_path) or "")
    assert found.parent == tmp_path / "version_10" / "checkpoints"
    assert resolve_checkpoint(str(found), tmp_path / "nowhere") == str(found)
    assert resolve_checkpoint(None, tmp_path) is None


@pytest.mark.parametrize("given", ["last", "nowhere.ckpt"])
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path, given: str) -> None:
    make(tmp_path, "version_0/checkpoints")
    with pytest.raises(ConfigError, match=f"ckpt_path = '{given}': "):
        resolve_checkpoint(given, tmp_path)
