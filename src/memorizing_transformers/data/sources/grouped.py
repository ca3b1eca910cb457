"""Records with the same value in a column as one document, e.g. the files of a repository.

The records of a group may be anywhere in a source. They are gathered in one file without a name,
which the system removes when nobody reads it any more; memory holds names, numbers and one text.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Collection, Hashable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError
from .columns import sort_key
from .documents import Entry, Source, join_texts
from .records import Records

BATCH_CHARACTERS = 1 << 22


class Member(NamedTuple):
    """A record of a group."""

    group: str
    place: tuple[int, float, str]
    """What orders it in its group, from `sort_key`."""
    text: str


def documents_of(records: Records, scratch: Path | None) -> Source:
    """The records as documents, grouped if their rules say so.

    Args:
        records: the records.
        scratch: a folder for the file of gathered texts. Default: the system's.
    """
    return records if records.rules.group is None else GroupedRecords(records, scratch)


class GroupedRecords(Source):
    """Documents made of all records that agree in a column, by the name that is its value.

    Records without a value in the column are left out and counted.

    Args:
        records: the records; their rules name the columns that group and sort.
        scratch: as for `documents_of`.
    """

    def __init__(self, records: Records, scratch: Path | None) -> None:
        super().__init__()
        self.records = records
        self.scratch = scratch
        self._names: list[str] | None = None
        self._gathered: _Gathered | None = None
        self._alone = 0

    def entries(self) -> Iterator[Entry]:
        """The documents, in the order of their names."""
        if self._names is None:
            self._names = sorted({member.group for member in self._members()})
        for name in self._names:
            yield Entry(name, partial(self._read, name))

    def fingerprint(self) -> str:
        """Hash of the content and of the columns that are read."""
        return self.records.fingerprint()

    def places(self) -> set[Hashable]:
        """The files or splits of datasets."""
        return self.records.places()

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read none of these files or splits."""
        self.records.leave_out(places)
        self._names = self._gathered = None

    def lines(self) -> list[str]:
        """Lines about records that were left out or mended."""
        lines = self.records.report()
        if self._alone:
            column = self.records.rules.group_column
            lines.append(
                f"{self.records.origin.value}: {self._alone:,} records left out, they have no "
                f"data.group_column ({column!r})"
            )
        return lines

    def _read(self, name: str) -> str:
        if self._gathered is None:
            self._gathered = _Gathered(self._members(), self.scratch)
        return join_texts(self._gathered.texts(name))

    def _members(self) -> Iterator[Member]:
        rules = self.records.rules
        sort = None if rules.sort is None or rules.sort.is_list else rules.sort
        self._alone = 0
        columns: dict[str, None] = {}
        grouped = False
        for kept in self.records.kept():
            group = rules.group_of(kept.record)
            if group is None:
                self._alone += 1
                if not grouped:
                    columns.update(dict.fromkeys(kept.record))
                continue
            grouped = True
            place = sort_key(None if sort is None else sort.value(kept.record))
            text = self.records.clean(kept.name, kept.text)
            yield Member(group, place, text)
        if self._alone and not grouped:
            remedy = (
                f"no record of {self.records.origin.value} has it; give one of {', '.join(columns)}"
            )
            raise ConfigError("data.group_column", rules.group_column, remedy)


class _Gathered:
    """The texts of all groups in a file, found by the name of their group.

    Args:
        members: the records of all groups, in any order.
        scratch: as for `documents_of`.
    """

    def __init__(self, members: Iterator[Member], scratch: Path | None) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        large = pa.large_string()
        schema = pa.schema(
            {
                "group": large,
                "kind": pa.int8(),
                "number": pa.float64(),
                "word": large,
                "text": large,
            }
        )
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            with pa.ipc.new_file(file, schema) as writer:
                for rows in _batches(members):
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
        self._text = table["text"]
        table = table.drop_columns(["text"])
        keys = [(name, "ascending") for name in table.column_names]
        self._order = pc.sort_indices(table, sort_keys=keys)
        counts = table["group"].value_counts().to_pylist()
        sizes = {count["values"]: count["counts"] for count in counts}
        names = sorted(sizes)
        ends = accumulate(sizes[name] for name in names)
        self._spans = {
            name: range(end - sizes[name], end) for name, end in zip(names, ends, strict=True)
        }

    def texts(self, name: str) -> list[str]:
        """The texts of a group, in order."""
        # One by one: to take several at once, Arrow may copy the texts of all groups.
        places = (self._order[index].as_py() for index in self._spans[name])
        return [self._text[place].as_py() for place in places]


def _batches(members: Iterator[Member]) -> Iterator[list[dict[str, Any]]]:
    """Rows of the file, some megabytes at a time."""
    rows: list[dict[str, Any]] = []
    size = 0
    for group, (kind, number, word), text in members:
        rows.append({"group": group, "kind": kind, "number": number, "word": word, "text": text})
        size += len(group) + len(word) + len(text)
        if size >= BATCH_CHARACTERS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows
