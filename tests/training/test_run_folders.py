"""Which folder a run lives in, and which checkpoint ``last`` is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small import Run, command, write_config

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.locks import lock_file
from memorizing_transformers.training.run_folders import (
    Claim,
    resolve_checkpoint,
    run_folder,
    versions,
)
from memorizing_transformers.training.tensorboard import RunLogger

ROOT = Path(__file__).parents[2]


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
        # Also from a folder that a slash in its name has made.
        assert run_folder(Path("runs"), "fit", f"{path}/val/b.ckpt") == run
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


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A folder owned by another live process."""
    code = f"from filelock import FileLock; import sys; l = FileLock({str(lock_file(folder))!r})"
    code += "; l.acquire(); print('held', flush=True); sys.stdin.read()"
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], **options)
    try:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        yield other
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("kind", [RunLogger, TensorBoardLogger, CSVLogger])
def test_runs_that_start_together_each_get_a_folder(kind: Any, tmp_path: Path) -> None:
    make(tmp_path, "version_7")
    # Every one has drawn its number before the first takes it.
    loggers = [kind(tmp_path, name="", version=None) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda logger: Claim().number([logger]), loggers))
    names = sorted(Path(logger.log_dir).name for logger in loggers)
    assert names == sorted(f"version_{number}" for number in range(8, 16))
    assert all(Path(logger.log_dir).is_dir() for logger in loggers)


def test_a_number_that_is_given_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "version_7")
    logger = RunLogger(tmp_path, name="", version="version_7")
    Claim().number([logger])
    assert logger.log_dir == str(tmp_path / "version_7")


def test_a_start_that_came_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for keep in (False, True):
        root, other = tmp_path / "runs" / str(keep), tmp_path / "other" / str(keep)
        claim, logger = Claim(), RunLogger(root, name="", version=None)
        claim.number([logger])
        claim.lock([Path(logger.log_dir), other])
        (root / "version_0" / "config.yaml").write_text("x: 1\n")
        claim.release(keep=keep)
        assert (root / "version_0" / "config.yaml").exists() == keep
        assert root.exists() == keep
        assert not [*tmp_path.rglob(".*.lock")]


def test_a_claim_never_removes_what_was_there(tmp_path: Path) -> None:
    make(tmp_path, "version_0")
    (tmp_path / "version_0" / "config.yaml").write_text("x: 1\n")
    claim, logger = Claim(), RunLogger(tmp_path, name="", version="version_0")
    claim.number([logger])
    claim.lock([Path(logger.log_dir)])
    claim.release(keep=False)
    assert (tmp_path / "version_0" / "config.yaml").exists()


def test_the_folder_is_claimed_before_the_data_is_prepared(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And locked from there to the end of training."""
    seen = []
    prepare = DocumentDataModule.prepare_data

    def watched(self: Any) -> None:
        folder = tmp_path / "runs" / "version_0"
        seen.append((folder.is_dir(), lock_file(folder).exists()))
        prepare(self)

    monkeypatch.setattr(DocumentDataModule, "prepare_data", watched)
    short = ("--trainer.max_steps", 2, "--final_report", "false")
    assert command("fit", "--config", config, *short)[0] == 0
    assert set(seen) == {(True, True)}
    assert not [*tmp_path.rglob(".*.lock")]


@pytest.mark.parametrize("owned", ["version_0", "version_0/checkpoints"])
def test_a_folder_where_another_run_trains_is_refused_in_one_line(
    run: Run, config: Path, tmp_path: Path, owned: str
) -> None:
    folder = tmp_path / "runs" / "version_0"
    shutil.copytree(run.folder, folder)
    before = sorted(path for path in folder.rglob("*"))
    short = ("--trainer.max_steps", 25, "--final_report", "false")
    with held_by_another(tmp_path / "runs" / owned) as other:
        code, _, err = command("fit", "--config", config, "--ckpt_path", "last", *short)
        assert code == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert str(tmp_path / "runs" / owned) in line
        assert "another run is training there" in line
        assert sorted(p for p in folder.rglob("*") if p.suffix != ".lock") == before
        # A new run beside it, and a test of what it has saved, are nobody's business.
        assert command("fit", "--config", config, *short)[0] == 0
        assert command("test", "--config", config, "--ckpt_path", "last")[0] == 0
        other.kill()
        other.wait()
        resume = ("--ckpt_path", folder / "checkpoints" / "last.ckpt")
        assert command("fit", "--config", config, *resume, *short)[0] == 0


def test_a_shared_dirpath_is_refused_while_another_run_trains(config: Path, tmp_path: Path) -> None:
    short = ("--trainer.max_steps", 2, "--final_report", "false", "--trainer.logger", "false")
    (tmp_path / "runs").mkdir()
    with held_by_another(tmp_path / "runs" / "checkpoints"):
        code, _, err = command("fit", "--config", config, *short)
    assert code == 2
    assert "another run is training there" in err
    assert command("fit", "--config", config, *short)[0] == 0


def test_two_processes_started_together_train_apart(texts: Path, tmp_path: Path) -> None:
    """On a corpus that is not tokenised yet, which lets both continue at the same moment."""
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    given = ["fit", "--config", str(config), "--trainer.max_steps", "3", "--final_report", "false"]
    given += ["--data.cache_dir", str(tmp_path / "cache")]
    line = [sys.executable, str(ROOT / "train.py"), *given]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen([*line, f"--seed_everything={n}"], **options) for n in (1, 2)]
    assert [process.wait(200) for process in both] == [0, 0]
    assert [path.name for path in versions(tmp_path / "runs")] == ["version_0", "version_1"]
    for folder in versions(tmp_path / "runs"):
        assert len([*folder.glob("events*")]) == 1
        assert (folder / "config.yaml").exists()
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
