"""Local files as a source: a file, a folder or a glob."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

from ..settings import Grouping
from .compression import kind_of
from .documents import Entry, Origin, Source, readable
from .files import FoundFile, find_files
from .record_files import READERS, record_files
from .records import Records
from .text_files import TextFiles, TextGroup


def open_files(
    origin: Origin, text_column: str, group: Grouping, cache_dir: Path | None = None
) -> Source:
    """Open the files that ``origin.value`` names.

    With ``group="file"``, ``.jsonl`` and ``.parquet`` files hold one document per record, and so do
    ``.json`` files unless there are other kinds too, as in a folder of source code. Any other
    file is one document. With ``group="folder"`` every file is text, and the files of each
    top-level folder are joined in path order; files next to those folders are documents of their
    own. Hidden files and folders, and what this program wrote, are left out.

    Raises:
        ConfigError: nothing is there, or no file that can be read.
    """
    files, outputs = find_files(origin, cache_dir)
    source = _source(files, text_column, group, origin)
    if outputs:
        more = f" and {len(outputs) - 1} more" if len(outputs) > 1 else ""
        source.notes.append(
            f"{origin.value}: left out what this program wrote: {readable(outputs[0])}{more}"
        )
    return source


def _source(
    files: Sequence[FoundFile], text_column: str, group: Grouping, origin: Origin
) -> Source:
    if group == "folder":
        return _checked(TextFiles(_groups_by_folder(files), origin), origin)
    kinds = {file: kind_of(file.path) for file in files}
    mixed = any(kind not in READERS for kind in kinds.values())
    # A .json file as often holds settings as records.
    records = [
        file for file, kind in kinds.items() if kind in READERS and not (mixed and kind == ".json")
    ]
    taken = set(records)
    texts = [TextGroup(file.name, [file.path]) for file in files if file not in taken]
    parts: list[Source] = []
    if records:
        parts.append(Records(record_files(records, text_column, origin), text_column, origin))
    if texts:
        text = TextFiles(texts, origin)
        parts.append(text if records else _checked(text, origin))
    return parts[0] if len(parts) == 1 else Chain(parts)


class Chain(Source):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__()
        self.parts = parts

    def entries(self) -> Iterator[Entry]:
        """The documents of all parts."""
        return chain.from_iterable(part.entries() for part in self.parts)

    def fingerprint(self) -> str:
        """Hash of the parts' fingerprints."""
        key = "\n".join(part.fingerprint() for part in self.parts)
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def places(self) -> set[Hashable]:
        """The places of all parts."""
        return set().union(*(part.places() for part in self.parts))

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Leave places out of every part."""
        for part in self.parts:
            part.leave_out(places)

    def lines(self) -> list[str]:
        """The parts' lines."""
        return [line for part in self.parts for line in part.report()]


def _checked(source: TextFiles, origin: Origin) -> TextFiles:
    if not source.groups:
        raise origin.error(f"no text file: {source.binary} files look binary (a NUL byte in them)")
    return source


def _groups_by_folder(files: Sequence[FoundFile]) -> list[TextGroup]:
    """Files come sorted by their parts, so a folder's files are neighbours."""
    return [
        TextGroup(name, [file.path for file in members])
        for name, members in groupby(files, lambda file: file.name.split("/")[0])
    ]
