"""Which checkpoint ``--ckpt_path`` means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from .folder import MANIFEST, TRAINER_FILE, candidates, is_complete, read_manifest, written

PARTS = (MANIFEST, TRAINER_FILE)
KEY = "ckpt_path"
ANY_RUN = "version_N"
"""In a path, any folder of a run."""


def resolve_checkpoint(
    ckpt_path: str | None, root: str | Path, command: str = "fit", places: Sequence[Path] = ()
) -> str | None:
    """A checkpoint's path.

    Args:
        ckpt_path: a checkpoint, a file of one, or a folder with checkpoints below, of which the
            newest is meant; ``last`` for the newest of all runs.
        root: ``trainer.default_root_dir``.
        command: ``fit`` needs more than weights; others do not.
        places: where the config saves checkpoints, at or below ``root`` or elsewhere.

    Raises:
        ConfigError: where there is none.
    """
    if ckpt_path is None:
        return None
    weights_suffice = command != "fit"
    if ckpt_path == "last":
        return str(_last(Path(root), weights_suffice, places))
    given = Path(ckpt_path)
    if not given.exists():
        remedy = "there is no such folder; give a path or 'last'"
        if given.is_symlink():
            remedy = "a link to a checkpoint that is gone; give a path or 'last'"
        raise ConfigError(KEY, ckpt_path, remedy)
    if given.is_file() and any((given.parent / part).is_file() for part in PARTS):
        given = given.parent  # a file of a checkpoint
    if given.is_dir() and not any((given / part).is_file() for part in PARTS):
        given = _newest(candidates(given), weights_suffice, ckpt_path, str(given))
    if not weights_suffice and is_complete(given) and _holds_weights_only(given):
        remedy = "it holds weights only, which cannot resume training; give another checkpoint"
        raise ConfigError(KEY, ckpt_path, remedy)
    return str(given)


def _holds_weights_only(checkpoint: Path) -> bool:
    return bool(read_manifest(checkpoint).get("weights_only"))


def _newest(found: list[Path], weights_suffice: bool, given: str, where: str) -> Path:
    """The first that will do.

    Raises:
        ConfigError: where none will.
    """
    for path in found:
        if weights_suffice or not _holds_weights_only(path):
            return path
    if found:
        remedy = f"those in {where} hold weights only, which cannot resume training"
        raise ConfigError(KEY, given, f"{remedy}; the newest is {found[0]}")
    raise ConfigError(KEY, given, f"no checkpoint in {where}; give the folder of one")


def _last(root: Path, weights_suffice: bool, places: Sequence[Path]) -> Path:
    """The newest checkpoint at or below the root, or where the config saves elsewhere."""
    found = [path for path in candidates(root) if not _of_another_root(path, root)]
    inside = root.resolve()
    for place in places:
        while ANY_RUN in place.parts:
            place = place.parent
        if not place.resolve().is_relative_to(inside):
            found += candidates(place)
    newest = sorted(found, key=_age, reverse=True)
    saved = " and ".join(dict.fromkeys(str(place) for place in places))
    where = f"{root} (this config saves to {saved})" if saved else str(root)
    return _newest(newest, weights_suffice, "last", where)


def _age(checkpoint: Path) -> tuple[Any, ...]:
    """When a checkpoint was written; of copies, that of the run with the highest number."""
    manifest = read_manifest(checkpoint)
    numbers = [
        int(part.removeprefix("version_"))
        for part in checkpoint.parts
        if part.startswith("version_") and part.removeprefix("version_").isdigit()
    ]
    return written(checkpoint), numbers, manifest.get("step", 0), str(checkpoint)


def _of_another_root(checkpoint: Path, root: Path) -> bool:
    """Whether a checkpoint belongs to runs whose root is a folder below ours.

    A run folder's config.yaml says what its root was called, wherever it was moved since.
    """
    for folder in checkpoint.relative_to(root).parents:
        run = root / folder
        if run.parent == root or not run.name.startswith("version_"):
            continue
        try:
            settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            name = Path(os.path.normpath(settings["trainer"]["default_root_dir"])).name
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            continue
        if name == run.parent.name != root.resolve().name:
            return True
    return False


def saved_to(trainer: Any, root: Path) -> list[Path]:
    """Where a config saves checkpoints, by the settings of its trainer.

    Args:
        trainer: the settings, not yet made into a trainer.
        root: its default_root_dir.
    """
    loggers = trainer["logger"]
    first = (loggers or [None])[0] if isinstance(loggers, list) else loggers
    if (first is None and isinstance(loggers, list)) or first is False:
        home = root / "checkpoints"
    elif first in (None, True):
        home = root / ANY_RUN / "checkpoints"
    else:
        options = _options(first)
        name = options.get("name", "lightning_logs") or ""
        version = options.get("version")
        run = ANY_RUN if version is None else version if isinstance(version, str) else None
        home = Path(options.get("save_dir") or root) / str(name) / (run or f"version_{version}")
        home = home / "checkpoints"
    callbacks = trainer["callbacks"]
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    folders = [_options(callback).get("dirpath") for callback in given]
    places = [Path(folder) for folder in folders if folder]
    return places if places and all(folders) else [home, *places]


def _options(setting: Any) -> dict[str, Any]:
    """The arguments of a class that a config names."""
    found = setting.get("init_args") if hasattr(setting, "get") else None
    return {} if found is None else {key: value for key, value in dict(found).items()}
