"""Records with a text column as documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from .columns import MISSING, NAME_COLUMNS, NotText, Record, RecordRules
from .documents import Entry, Origin, Source, first_line, readable
from .record_filter import RecordFilter

RULES = "records 2"
"""Part of the fingerprint; changes whenever names or texts of the same records do."""
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, as JSON can spell it, stands for no character."""


class RecordStream(NamedTuple):
    """Records of one place, opened again for each reading."""

    name: str
    """Where the records are, for errors; also the name of records that bear none."""
    open: Callable[[], Iterable[Record]]
    content: Callable[[], str]
    """A hash of what is there."""
    place: Hashable
    """What is the same whatever the place is called."""


class Kept(NamedTuple):
    """A record that the filter keeps."""

    name: str
    """Its ``title``, ``name`` or ``id``, whichever is filled first, else its place and number."""
    record: Record
    text: str


class Records(Source):
    """Documents made of records, one of each.

    Columns that the rules do not name are not looked at, but for those that name a record.

    Args:
        streams: where the records come from, in reading order.
        rules: the columns of text, and the filter. A record without text is an empty document.
        origin: the setting to name in errors.

    Raises:
        ConfigError: the text column is missing or empty in all records of a place or holds no text,
            the filter keeps no record, or a record cannot be read.
    """

    def __init__(self, streams: Sequence[RecordStream], rules: RecordRules, origin: Origin) -> None:
        super().__init__()
        self.streams = list(streams)
        self.rules = rules
        self.origin = origin
        self.replaced: set[str] = set()
        self._filter = RecordFilter(rules, origin)

    def entries(self) -> Iterator[Entry]:
        """The documents, in order."""
        for kept in self.kept():
            yield Entry(kept.name, partial(self.clean, kept.name, kept.text))

    def kept(self) -> Iterator[Kept]:
        """The records that the filter keeps, in order, their texts as they stand."""
        self._filter = filtered = RecordFilter(self.rules, self.origin)
        seen: dict[str, bool] = {}
        filled = False
        for stream in self.streams:
            here: dict[str, Any] = {}
            count, present = 0, False
            for number, record in enumerate(self._read(stream)):
                if not filtered.keeps(record):
                    continue
                count += 1
                if not (present and filled):
                    here.update(record)
                    _note_columns(seen, record)
                try:
                    text = self.rules.text_of(record)
                except NotText as error:
                    raise self._no_text(str(error), _with_text(record)) from None
                present = present or text is not MISSING
                filled = filled or isinstance(text, str)
                yield Kept(
                    _record_name(record, f"{stream.name}-{number:06d}"),
                    record,
                    text if isinstance(text, str) else "",
                )
            if count and not present:
                with_text = [name for name in here if seen[name]]
                others = [name for name in here if not seen[name]] if with_text else []
                raise self._no_text(f"no column {self.rules.text_column!r}", with_text + others)
        if seen and not filled:
            what = f"column {self.rules.text_column!r} is empty in all records"
            raise self._no_text(what, [name for name in seen if seen[name]])
        filtered.refuse_nothing_kept()

    def fingerprint(self) -> str:
        """Hash of the content and of the columns that are read."""
        key = [RULES, *self.rules.facts(), *(stream.content() for stream in self.streams)]
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    def places(self) -> set[Hashable]:
        """The files or splits of datasets."""
        return {stream.place for stream in self.streams}

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read none of these files or splits."""
        self.streams = [stream for stream in self.streams if stream.place not in places]

    def lines(self) -> list[str]:
        """Lines about replaced bytes and filtered records, as far as documents were read."""
        lines = self._filter.lines()
        if self.replaced:
            lines.append(
                f"{self.origin.value}: U+FFFD, which stands for bytes that are not UTF-8, in "
                f"{len(self.replaced)} documents, e.g. {readable(min(self.replaced))}"
            )
        return lines

    def clean(self, name: str, text: str) -> str:
        """A text without half pairs; a document that lost characters is noted by its name."""
        text = HALF_PAIR.sub("\ufffd", text)
        if "\ufffd" in text:
            self.replaced.add(name)
        return text

    def _read(self, stream: RecordStream) -> Iterator[Record]:
        try:
            yield from stream.open()
        except StopIteration:
            return  # `datasets` says so of a split with no record
        # Every reader has its own errors (Arrow, gzip, zlib, the network), hence so wide a net.
        except Exception as error:
            raise self.origin.error(
                f"cannot read records of {readable(stream.name)} ({first_line(error)}); mend or "
                "leave it out"
            ) from error

    def _no_text(self, what: str, columns: Sequence[str]) -> Exception:
        if not columns:
            return self.origin.error(f"{what}; the records have no text column")
        return self.origin.error(f"{what}; set data.text_column to one of {', '.join(columns)}")


def _with_text(record: Record) -> list[str]:
    return [name for name, value in record.items() if isinstance(value, str)]


def _note_columns(columns: dict[str, bool], record: Record) -> None:
    """Add a record's columns, and whether each held text so far."""
    for name, value in record.items():
        columns[name] = columns.get(name, False) or isinstance(value, str)


def _record_name(record: Mapping[str, Any], fallback: str) -> str:
    for column in NAME_COLUMNS:
        value = record.get(column)
        if value is not None and str(value):
            return str(value)
    return fallback
