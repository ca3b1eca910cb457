"""Local files as a source: a file, a folder or a glob."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, takewhile
from pathlib import Path

from .documents import Document, Origin, Source, Wanted
from .records import builder_of, is_plain_json, record_files
from .settings import Grouping
from .text_files import TextFiles, TextGroup


def open_files(origin: Origin, text_column: str, group: Grouping) -> Source:
    """Open the files that ``origin.value`` names.

    With ``group="file"``, ``.jsonl`` and ``.parquet`` files hold one document per record, and so do
    ``.json`` files unless other kinds stand beside them, as in a folder of source code. Any other
    file is one document. With ``group="folder"`` every file is text, and the files of each
    top-level folder are joined in path order; files beside those folders are documents of their
    own. Hidden files and folders are left out.

    Raises:
        ConfigError: nothing is there, or no file that can be read.
    """
    root, files = find_files(origin)
    if group == "folder":
        text = TextFiles(_groups_by_folder(root, files), origin)
        return _checked(text, origin)

    builders = {file: builder_of(file) for file in files}
    mixed = None in builders.values()
    records = [
        file
        for file, builder in builders.items()
        if builder is not None and not (mixed and is_plain_json(file))
    ]
    taken = set(records)
    texts = [
        TextGroup(file.relative_to(root).as_posix(), [file]) for file in files if file not in taken
    ]
    parts: list[Source] = []
    if records:
        parts.append(record_files(records, root, text_column, origin))
    if texts:
        text = TextFiles(texts, origin)
        parts.append(text if records else _checked(text, origin))
    return parts[0] if len(parts) == 1 else Chain(parts)


def find_files(origin: Origin) -> tuple[Path, list[Path]]:
    """The files that a path or glob names, in path order, and the folder that they stand in.

    Raises:
        ConfigError: the path does not exist, or there is no file that is not hidden.
    """
    path = Path(origin.value).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif glob.has_magic(str(path)):
        root = _fixed_part(path)
        found = (Path(match) for match in glob.iglob(str(path), recursive=True))
    else:
        raise origin.error(
            f"no such file or folder in {os.getcwd()}; give 'stdlib', a file, a folder, a glob or "
            "hub:owner/name"
        )
    files = sorted(
        {file for file in found if file.is_file() and not _hidden(file.relative_to(root))},
        key=lambda file: file.parts,
    )
    if not files:
        kind = "the folder holds no file" if path.is_dir() else "the glob matches no file"
        raise origin.error(f"{kind} (hidden ones are left out)")
    return root, files


class Chain:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts

    def names(self) -> Iterator[str]:
        """The names of all parts' documents."""
        return chain.from_iterable(part.names() for part in self.parts)

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """The wanted documents of all parts."""
        return chain.from_iterable(part.documents(wanted) for part in self.parts)

    def fingerprint(self) -> str:
        """Hash of the parts' fingerprints."""
        key = "\n".join(part.fingerprint() for part in self.parts)
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def report(self) -> list[str]:
        """The parts' lines."""
        return [line for part in self.parts for line in part.report()]


def _checked(source: TextFiles, origin: Origin) -> TextFiles:
    if not source.groups:
        raise origin.error(f"no text file: {source.binary} files look binary (a NUL byte in them)")
    return source


def _groups_by_folder(root: Path, files: Sequence[Path]) -> list[TextGroup]:
    """Files come sorted by their parts, so a folder's files are neighbours."""
    return [
        TextGroup(name, list(members))
        for name, members in groupby(files, lambda file: file.relative_to(root).parts[0])
    ]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """The folder before a glob's first wildcard."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
