"""Where a run lives: ``ROOT/version_N`` with its events, config.yaml and checkpoints/."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError
from .checkpoints import candidates


def versions(root: Path) -> list[Path]:
    """The run folders under ``root``, oldest first."""
    found = [p for p in root.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def resolve_checkpoint(ckpt_path: str | None, root: str | Path) -> str | None:
    """A checkpoint's path; ``last`` is the newest whole one of the newest run under ``root``.

    Raises:
        ConfigError: where there is none.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        for folder in reversed(versions(Path(root))):
            found = candidates(folder / "checkpoints")
            if found:
                return str(found[0])
        remedy = f"no checkpoint in version_*/checkpoints under {root}; leave it out to start anew"
        raise ConfigError("ckpt_path", ckpt_path, remedy)
    if not Path(ckpt_path).exists():
        raise ConfigError("ckpt_path", ckpt_path, "there is no such folder; give a path or 'last'")
    return ckpt_path


def run_folder(root: Path, command: str, ckpt_path: str | None) -> Path:
    """The folder that a command logs to.

    Training from a checkpoint goes on in the checkpoint's own run; all else begins a new folder,
    commands other than fit under a folder of their name.
    """
    if command != "fit":
        root = root / command
    elif ckpt_path is not None:
        run = Path(ckpt_path).resolve().parent.parent
        for known in versions(root):
            if known.resolve() == run:
                return known
    taken = versions(root)
    number = int(taken[-1].name.removeprefix("version_")) + 1 if taken else 0
    return root / f"version_{number}"
