"""Which files a path or a glob means: each once, hidden ones and what this program wrote left out.

A file is itself, not its name: links to it, links to a folder of it and hard links are further
names of one file. Linked folders are entered, in a folder and by ``**`` alike, except where they
lead back into a folder that they are in or that was read already.
"""

from __future__ import annotations

import glob
import heapq
import os
import stat
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from .documents import Origin, first_line, readable
from .outputs import Outputs

DEEP = "**"

Match = tuple[str, os.stat_result]
"""The path of a file, and what the system says of it."""


class FoundFile(NamedTuple):
    """A file of a source."""

    location: str
    """Its path."""
    name: str
    """Its path below the source's folder, with forward slashes."""

    @property
    def path(self) -> Path:
        """Its path as a `Path`, made anew: costly where files are many."""
        return Path(self.location)


class Found(NamedTuple):
    """The files of a source."""

    files: list[FoundFile]
    """In path order."""
    outputs: list[Path]
    """Folders and files that this program wrote and that were left out, in path order."""


def find_files(origin: Origin, cache_dir: Path | None = None) -> Found:
    """The files that a path or glob names.

    Args:
        origin: the setting; its value is the path or glob.
        cache_dir: the folder of token stores.

    Raises:
        ConfigError: the path does not exist, a folder cannot be listed, or there is no file that is
            neither hidden nor written by this program.
    """
    path = Path(origin.value).expanduser()
    if path.is_file():
        root, kind, paths = path.parent, "file", iter([(str(path), os.stat(path))])
    elif path.is_dir():
        root, kind, paths = path, "folder", _matches((glob.escape(str(path)), DEEP, "*"), origin)
    elif glob.has_magic(str(path)):
        root, kind, paths = _fixed_part(path), "glob", _matches(path.parts, origin)
    else:
        raise origin.error(
            f"no such file or folder in {os.getcwd()}; give 'stdlib', a file, a folder, a glob or "
            "hub:owner/name"
        )
    outputs = Outputs(root, cache_dir)
    files, owners = [], set()
    for file in _each_once(root, paths, with_hidden=kind == "file"):
        owner = outputs.owner(file.location)
        if owner is None:
            files.append(file)
        else:
            owners.add(owner)
    if not files:
        raise origin.error(_nothing(kind, bool(owners)))
    return Found(files, sorted(owners))


def place_of(file: Path | str) -> Hashable:
    """What is the same for all names of a file."""
    return _place(file, os.stat(file))


def _place(file: Path | str, facts: os.stat_result) -> Hashable:
    # Some network file systems number no files.
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(file)


def _nothing(kind: str, outputs: bool) -> str:
    if kind == "file":
        return "this program wrote it; give a text"
    what = "the folder holds no file" if kind == "folder" else "the glob matches no file"
    also = " and what this program wrote" if outputs else ""
    return f"{what} (hidden ones{also} are left out)"


def _each_once(root: Path, paths: Iterator[Match], with_hidden: bool) -> list[FoundFile]:
    """Of each file the name without links, else the first in path order; files in path order."""
    names: dict[Hashable, list[tuple[list[str], str]]] = {}
    # A corpus may have very many files, and strings are several times as fast as paths.
    start = os.path.join(root, "")
    for path, facts in paths:
        below = path[len(start) :] if path.startswith(start) else Path(path).relative_to(root)
        name = os.path.normpath(below).replace(os.sep, "/")
        if not name.isascii():  # alike in every locale
            name = os.fsencode(name).decode("utf-8", "surrogateescape")
        if with_hidden or not _hidden(name):
            names.setdefault(_place(path, facts), []).append((name.split("/"), path))
    real_root = os.path.realpath(root)

    def by_link(file: tuple[list[str], str]) -> bool:
        below = Path(file[1]).relative_to(root)
        return os.path.realpath(file[1]) != os.path.join(real_root, below)

    chosen = [
        min(found, key=lambda file: (by_link(file), file[0])) if len(found) > 1 else found[0]
        for found in names.values()
    ]
    return [FoundFile(path, "/".join(parts)) for parts, path in sorted(chosen)]


def _hidden(name: str) -> bool:
    return (name[0] == "." or "/." in name) and any(
        part.startswith(".") and part != ".." for part in name.split("/")
    )


def _matches(pattern: Sequence[str], origin: Origin) -> Iterator[Match]:
    """The files that match the parts of a glob; a file may come under several names."""
    head = list(takewhile(lambda part: part != DEEP, pattern))
    if len(head) == len(pattern):
        for match in glob.iglob(os.path.join(*head)):
            with suppress(OSError):  # a link that leads nowhere
                facts = os.stat(match)
                if stat.S_ISREG(facts.st_mode):
                    yield match, facts
        return
    tail = tuple(pattern[len(head) + 1 :]) or ("*",)
    tops = glob.iglob(os.path.join(*head)) if head else ["."]
    for top in tops:
        if os.path.isdir(top):
            for folder, entries in _folders(Path(top), origin):
                if tail == ("*",):
                    yield from _files(entries)
                else:
                    yield from _matches((glob.escape(str(folder)), *tail), origin)


def _files(entries: Sequence[os.DirEntry[str]]) -> Iterator[Match]:
    """The files among a folder's entries that are not hidden, as the glob ``*`` has them."""
    for entry in entries:
        if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False):
            with suppress(OSError):
                facts = entry.stat()
                if stat.S_ISREG(facts.st_mode):
                    yield entry.path, facts


def _folders(top: Path, origin: Origin) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """A folder and those below it, each once and with its entries: what no link leads to first."""
    seen: set[Hashable] = set()
    waiting = deque([top])
    linked: list[Path] = []
    while waiting or linked:
        folder = waiting.popleft() if waiting else heapq.heappop(linked)
        place = place_of(folder)
        if place in seen:
            continue
        seen.add(place)
        try:
            with os.scandir(folder) as listing:
                entries = [*listing]
        except OSError as error:
            raise origin.error(
                f"cannot list {readable(folder)} ({first_line(error)}); mend it or leave it out"
            ) from error
        yield folder, entries
        below = [
            folder / entry.name
            for entry in entries
            if not entry.name.startswith(".") and _is_folder(entry)
        ]
        for path in below:
            if not path.is_symlink():
                waiting.append(path)
            elif not _leads_back(path):
                heapq.heappush(linked, path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; only a link takes a call of the system."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _leads_back(link: Path) -> bool:
    """Whether a linked folder holds the link itself."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(link.parent)]) == target


def _fixed_part(pattern: Path) -> Path:
    """The folder before a glob's first wildcard."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
