"""What checkpoints need of a file system: digests, files that are complete or absent, a walk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete as soon as it has its name."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    sync(draft)
    draft.rename(path)


def walk(folder: Path, marks: Collection[str]) -> Iterator[Path]:
    """Every folder at or below one that holds a file of these names.

    Links are followed, each place is visited once, and nothing is looked for below a folder that
    was found. Hidden folders are left out except for ``.NAME.replaced``: a run that died between
    the two renames of a save has its last checkpoint there.
    """
    seen = set()
    for path, names, files in os.walk(folder, followlinks=True):
        here = Path(path)
        place = here.resolve()
        if place in seen:
            names.clear()
            continue
        seen.add(place)
        if any(mark in files for mark in marks):
            names.clear()
            yield here
        # Real folders before links, so that a checkpoint has its own name, not that of a link.
        names.sort(key=lambda name: ((here / name).is_symlink(), name))
        names[:] = [n for n in names if not n.startswith(".") or n.endswith(".replaced")]
