"""Local files as a source: a file, a folder or a glob."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterator, Sequence
from graphlib import CycleError
from itertools import chain, groupby
from pathlib import Path

from ..settings import Grouping
from .columns import RecordRules
from .compression import kind_of
from .documents import Entry, Origin, Source, readable
from .files import FoundFile, find_files
from .grouped import documents_of
from .import_order import in_import_order
from .record_files import READERS, record_files
from .records import Records
from .text_files import TextFiles, TextGroup
from .token_files import TokenFiles, token_files


def open_files(
    origin: Origin, rules: RecordRules, group: Grouping, cache_dir: Path | None = None
) -> Source:
    """Open the files that ``origin.value`` names.

    With ``group="file"``, ``.jsonl`` and ``.parquet`` files hold one document per record, and so do
    ``.json`` files unless there are other kinds too, as in a folder of source code. Files of tokens
    that datatrove wrote hold documents too. Any other file is one document. With
    ``group="folder"`` every file is text unless the rules group records; texts of each top-level
    folder are joined in path order, and files next to those folders are documents of their own.
    ``group="isabelle"`` does the same, but an Isabelle theory comes after those that it imports.
    Hidden files and folders, and what this program wrote, are left out.

    Raises:
        ConfigError: nothing is there, no file that can be read, or texts next to tokens.
    """
    files, outputs = find_files(origin, cache_dir)
    if token_files(files):
        source: Source = TokenFiles(files, group, origin)
    else:
        source = _source(files, rules, group, origin, cache_dir)
    if outputs:
        more = f" and {len(outputs) - 1} more" if len(outputs) > 1 else ""
        source.notes.append(
            f"{origin.value}: left out what this program wrote: {readable(outputs[0])}{more}"
        )
    return source


def _source(
    files: Sequence[FoundFile],
    rules: RecordRules,
    group: Grouping,
    origin: Origin,
    cache_dir: Path | None,
) -> Source:
    if group != "file" and rules.group is None:
        folders = _checked(TextFiles(_groups_by_folder(files), origin), origin)
        if group == "isabelle":
            folders.groups = [_by_imports(folder, folders) for folder in folders.groups]
        return folders
    kinds = {file: kind_of(file.path) for file in files}
    mixed = any(kind not in READERS for kind in kinds.values())
    # A .json file as often holds settings as records.
    records = [
        file for file, kind in kinds.items() if kind in READERS and not (mixed and kind == ".json")
    ]
    taken = set(records)
    others = [file for file in files if file not in taken]
    if group == "folder":
        texts = _groups_by_folder(others)
    else:
        texts = [TextGroup(file.name, [file.path]) for file in others]
    parts: list[Source] = []
    if records:
        streams = Records(record_files(records, rules, origin), rules, origin)
        parts.append(documents_of(streams, cache_dir))
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


def holds_records(source: Source) -> bool:
    """Whether some documents of a source come from records."""
    parts = source.parts if isinstance(source, Chain) else [source]
    return any(not isinstance(part, (TextFiles, TokenFiles)) for part in parts)


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


def _by_imports(folder: TextGroup, source: TextFiles) -> TextGroup:
    """A folder's files, Isabelle theories in the order of their imports."""
    files = {file.as_posix(): file for file in folder.files}
    try:
        order = in_import_order([*files], lambda name: source.read_text(files[name]))
    except CycleError as error:
        circle = ", ".join(Path(name).name for name in error.args[1])
        raise source.origin.error(
            f"theories of {readable(folder.name)} import each other ({circle}); mend them, or set "
            "data.group to 'folder'"
        ) from None
    return TextGroup(folder.name, [files[name] for name in order])
