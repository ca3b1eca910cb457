"""Where a run lives: ``ROOT/version_N`` with its events, config.yaml and checkpoints/.

A run claims its folders before any work: it makes a new one under the next free number, and locks
all that it writes to until it ends.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from . import locks
from .checkpoint.finding import resolve_checkpoint

__all__ = ["Claim", "resolve_checkpoint", "run_folder", "versions"]


def versions(root: Path) -> list[Path]:
    """The run folders under ``root``, oldest first."""
    found = [p for p in root.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def run_folder(root: Path, command: str, ckpt_path: str | None) -> Path:
    """The folder that a command logs to.

    Training from a checkpoint continues in the checkpoint's own run; all else begins a new folder,
    commands other than fit under a folder of their name. A new one is a proposal: ``Claim`` takes
    it, or the next that is free.
    """
    if command != "fit":
        root = root / command
    elif ckpt_path is not None:
        above = Path(ckpt_path).resolve().parents
        for known in versions(root):
            if known.resolve() in above:
                return known
    taken = versions(root)
    number = int(taken[-1].name.removeprefix("version_")) + 1 if taken else 0
    return root / f"version_{number}"


class Claim:
    """The folders that a run writes to, its own until it ends."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        """Folders that were not there before, the outermost first."""
        self._new: list[Path] = []
        """Run folders that were made for this run."""
        self._locked: list[Path] = []

    def _make(self, folder: Path) -> None:
        """Make a folder that nobody has made before.

        Raises:
            FileExistsError: where the folder exists.
        """
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        self._made += reversed(missing)

    def number(self, loggers: Iterable[Any]) -> None:
        """Make a run folder for every logger that is to find a number by itself."""
        for logger in loggers:
            if not isinstance(logger, CSVLogger | TensorBoardLogger):
                continue
            while logger._version is None:
                folder = Path(logger.log_dir)  # draws the next number
                try:
                    self._make(folder)
                except FileExistsError:
                    logger._version = None
                    continue
                self._new.append(folder)

    def lock(self, folders: Iterable[Path]) -> None:
        """Own folders until the release.

        Raises:
            UserError: where another live run owns one.
        """
        for folder in folders:
            missing = [path for path in folder.parents if not path.exists()]
            if locks.take(folder):
                self._locked.append(folder)
            self._made += reversed(missing)

    def release(self, keep: bool) -> None:
        """Give the folders back.

        Args:
            keep: whether the run has done any work; otherwise its new folders are removed.
        """
        while self._locked:
            locks.release(self._locked.pop())
        if not keep:
            for folder in self._new:
                _remove_start(folder)
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._made, self._new = [], []


def _remove_start(folder: Path) -> None:
    """Remove what a start that came to nothing wrote: events and settings, and empty folders."""
    for pattern in ("events.out.tfevents.*", "config.yaml", "hparams.yaml", "metrics.csv"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / "checkpoints").rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
