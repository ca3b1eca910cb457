"""What this program writes, recognised by what is in a folder, so that it is never read as text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..tokens.store import CACHE_TAG, MANIFEST

RUN = "version_[0-9]*"
EVENTS = "events.out.tfevents.*"
RUN_FILES = (EVENTS, "hparams.yaml", "config.yaml", "metrics.csv", "report.json", "checkpoints")
PREDICTIONS = ("predictions*.parquet", "documents*.parquet")
TABLES = ("table.md", "table.csv", "trials.csv", "plot.png", "tensorboard")
TASKS = ("table.md", "table.json", "items.json", "scores.json", "index.html", "table.csv", "*.png",
         "tensorboard")  # fmt: skip
MEMORIZED = ("memorized.json", "memory.safetensors", "tokenizer")
MODEL = ("config.json", "generation_config.json", "model*.safetensors*", "tokenizer", "README.md")
EVERYTHING = ("*",)
COMPLETE_FOLDERS = ((MANIFEST, "train.tokens.bin"), (MANIFEST, "trainer.ckpt"))
"""A token store and a checkpoint, by files that only they hold together."""
TRACES = re.compile(r"[0-9a-f]{16}\.(files|lock|tmp-.*)|\..*\.partial")
"""Notes and locks of token stores; stores and other files that are being written."""
SAVED_CONFIG = b"# lightning.pytorch=="


class Rule(NamedTuple):
    """Files of ours in one kind of folder."""

    folder: str
    """Pattern of the folder's name."""
    evidence: tuple[str, ...]
    """Patterns that each match a name in the folder."""
    ours: tuple[str, ...]
    """Patterns of the names that are ours then."""


RULES = (
    *(Rule("*", names, EVERYTHING) for names in COMPLETE_FOLDERS),
    Rule(RUN, (EVENTS,), EVERYTHING),
    Rule(RUN, ("hparams.yaml",), EVERYTHING),
    Rule(RUN, ("metrics.csv",), EVERYTHING),
    Rule(RUN, ("predictions*.parquet",), EVERYTHING),
    Rule("seed-[0-9]*", ("trial.json",), EVERYTHING),
    Rule("*", (EVENTS,), RUN_FILES),
    Rule("*", ("metrics.csv", "hparams.yaml"), RUN_FILES),
    Rule("*", ("predictions.parquet", "documents.parquet"), PREDICTIONS),
    Rule("*", TABLES[:3], TABLES),
    Rule("*", TASKS[:4], TASKS),
    Rule("*", ("index.html", "tokens.jsonl"), ("index.html", "tokens.jsonl")),
    Rule("*", ("config.json", "model*.safetensors"), MODEL),
    Rule("*", MEMORIZED[:2], MEMORIZED),
)


class Ours(NamedTuple):
    """What is ours in a folder."""

    names: set[str]
    complete: bool
    """Whether that is everything, whatever else comes."""
    links: set[str] | None
    """Names of symbolic links, whether ours or not; None where the folder cannot be listed."""


class Outputs:
    """Tells which files below a folder this program wrote.

    Args:
        root: the folder.
        cache_dir: the folder of token stores. All in it is left out, unless ``root`` is in it.
    """

    def __init__(self, root: Path, cache_dir: Path | None = None) -> None:
        cache = None if cache_dir is None else Path(os.path.realpath(cache_dir))
        self._cache = None if cache in _upwards(root) else cache
        self._folders: dict[Path, Path | None] = {root: root if _in_complete(root) else None}
        self._entries: dict[Path, Ours] = {}
        self._special: dict[str, set[str] | None] = {}
        """By folder, the names that may be ours; None for all."""

    def owner(self, location: str | Path) -> Path | None:
        """The uppermost folder of ours that holds a file below the root, or the file itself if it
        alone is ours; None if it is a text."""
        head, name = os.path.split(location)
        if head not in self._special:
            ours = self._ours(Path(head))
            every = self._folder_owner(Path(head)) is not None or ours.links is None
            self._special[head] = None if every else ours.names | (ours.links or set())
        special = self._special[head]
        if special is not None and name not in special:
            return None
        file = Path(location)
        folder = file.parent
        return self._folder_owner(folder) or (file if self._is_entry(file, folder) else None)

    def _folder_owner(self, folder: Path) -> Path | None:
        if folder not in self._folders:
            owner = self._folder_owner(folder.parent)
            ours = (
                self._is_entry(folder, folder.parent)
                or self._is_cache(folder)
                or self._ours(folder).complete
            )
            self._folders[folder] = owner or (folder if ours else None)
        return self._folders[folder]

    def _is_entry(self, path: Path, folder: Path) -> bool:
        ours = self._ours(folder)
        if path.name in ours.names:
            return True
        may_link = ours.links is None or path.name in ours.links
        if not may_link or not path.is_symlink():
            return False
        return _in_complete(path) or self._cache in _upwards(path)

    def _ours(self, folder: Path) -> Ours:
        if folder not in self._entries:
            self._entries[folder] = ours_in(folder)
        return self._entries[folder]

    def _is_cache(self, folder: Path) -> bool:
        here = self._cache is not None and Path(os.path.realpath(folder)) == self._cache
        return here or (folder / CACHE_TAG).is_file()


def ours_in(folder: Path) -> Ours:
    """What is ours in a folder by its rules."""
    known, links = _listed(folder)
    own_name = os.path.basename(os.path.realpath(folder))
    if fnmatchcase(own_name, RUN) and "config.yaml" in known and _is_saved_config(folder):
        return Ours(known, complete=True, links=links)
    ours = {name for name in known if TRACES.fullmatch(name)}
    complete = False
    for rule in RULES:
        if fnmatchcase(own_name, rule.folder) and all(_holds(known, e) for e in rule.evidence):
            ours.update(name for name in known if any(fnmatchcase(name, o) for o in rule.ours))
            complete = complete or rule.ours == EVERYTHING
    return Ours(ours, complete, links)


def _listed(folder: Path) -> tuple[set[str], set[str] | None]:
    """The names in a folder, and those of them that are symbolic links."""
    try:
        with os.scandir(folder) as listing:
            entries = [*listing]
    except OSError:  # a file may be readable in a folder that is not
        return set(), None
    links = {entry.name for entry in entries if entry.is_symlink()}
    return {entry.name for entry in entries}, links


def _holds(names: set[str], pattern: str) -> bool:
    if "*" not in pattern:
        return pattern in names
    return any(fnmatchcase(name, pattern) for name in names)


def _is_saved_config(folder: Path) -> bool:
    try:
        with open(folder / "config.yaml", "rb") as stream:
            return stream.read(len(SAVED_CONFIG)) == SAVED_CONFIG
    except OSError:
        return False


def _upwards(path: Path) -> Sequence[Path]:
    """The true path and all folders above it."""
    real = Path(os.path.realpath(path))
    return (real, *real.parents)


def _in_complete(path: Path) -> bool:
    """Whether a path is, or lies in, a token store or a checkpoint, finished or not."""
    return any(
        TRACES.fullmatch(folder.name)
        or any(all((folder / name).is_file() for name in names) for names in COMPLETE_FOLDERS)
        for folder in _upwards(path)
    )
