"""Which store a corpus became when it was last read, so that it is not read again unchanged.

A note ``cache_dir/<key>.files`` holds the name of the store, and a hash of what the file system
said of the corpus's files: name, size, times and inode. Two changes that follow each other at once
may get the same time. So of files that had just changed the note also holds a hash of the content;
git treats its index likewise. A tokenizer in a folder is known by its files too, since loading it
takes longer than all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..settings import TokenizerSettings
from ..sources.documents import Origin
from ..sources.text_files import hash_file
from .store import read_manifest
from .tokenizers import BPE, BYTES

YOUNG_NS = 2 * 10**9
"""Nanoseconds within which a second change may get the time of the first; FAT counts in these."""


class KnownStore:
    """The note of one corpus, and its files as they are now.

    To be made before the files are read: what changes later is then noticed at the next start.

    Args:
        cache_dir: the folder of token stores.
        facts: everything but the files that decides which tokens the store holds.
        files: all files that may be read, in an order that depends on nothing else.
    """

    def __init__(self, cache_dir: Path, facts: Sequence[Any], files: Iterable[str | Path]) -> None:
        key = repr([_rules(), os.getcwd(), *facts])
        self.path = cache_dir / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.files"
        self.stamps, self.young = _look_at(files)
        self.contents: dict[str, str] = {}
        """Of the young files, as they were before they were read."""

    def find(self) -> Path | None:
        """The folder of the store; None unless it is complete and no file has changed."""
        try:
            note = json.loads(self.path.read_text("utf-8"))
            noted, contents = note["stamps"], dict(note["contents"])
            folder = self.path.parent / note["store"]
        except (OSError, ValueError, LookupError, TypeError):
            noted, contents, folder = "", {}, self.path
        if noted == self.stamps and _contents(contents) == contents and read_manifest(folder):
            self.contents = {file: contents[file] for file in self.young if file in contents}
            if self.contents != contents:
                self.note(folder)  # the others have been left alone for long enough
            return folder
        self.contents = _contents(self.young)
        return None

    def note(self, folder: Path) -> None:
        """Note that the files became the store in a folder."""
        note = {"store": folder.name, "stamps": self.stamps, "contents": self.contents}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        # Without a note the files are read at the next start: slower, and not wrong.
        with suppress(OSError):
            temporary.write_text(json.dumps(note) + "\n", "utf-8")
            temporary.replace(self.path)


def tokenizer_files(settings: TokenizerSettings) -> list[Path] | None:
    """The files that decide a tokenizer's ids, empty if its name alone does.

    None for a name on the hub, whose files may change without the name.
    """
    if settings.tokenizer in (BYTES, BPE):
        return []
    folder = Path(settings.tokenizer)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _look_at(files: Iterable[str | Path]) -> tuple[str, list[str]]:
    """A hash of what the file system says of files, and those that changed a moment ago."""
    now, digest, young = time.time_ns(), hashlib.blake2b(digest_size=16), []
    for file in map(str, files):
        try:
            facts = os.stat(file)
        except OSError:
            continue  # whoever reads it will say so
        changed = facts.st_mtime_ns, facts.st_ctime_ns
        digest.update(b"%b\0%d %d %d %d\n" % (
            os.fsencode(file), facts.st_size, *changed, facts.st_ino
        ))  # fmt: skip
        if max(changed) >= now - YOUNG_NS:
            young.append(file)
    return digest.hexdigest(), young


def _contents(files: Iterable[str]) -> dict[str, str]:
    """A hash of each file's content, empty where it cannot be read."""
    return {file: _content(file) for file in files}


def _content(file: str) -> str:
    try:
        return hash_file(file, Origin("data.source", file)).hex()
    except ConfigError:
        return ""


@cache
def _rules() -> str:
    """A hash of this room's code and of the tokenizers' versions: with others, the same files may
    become another store."""
    digest = hashlib.blake2b(digest_size=16)
    for package in ("tokenizers", "transformers"):
        digest.update(f"{package} {version(package)}\n".encode())
    room = Path(__file__).parents[1]
    for file in sorted(room.rglob("*.py")):
        digest.update(file.relative_to(room).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
