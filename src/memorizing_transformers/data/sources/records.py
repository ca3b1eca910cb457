"""Records with a text column as documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from .documents import Entry, Origin, Source, first_line, readable

NAME_COLUMNS = ("title", "name", "id")
RULES = "records 2"
"""Part of the fingerprint; changes whenever names or texts of the same records do."""
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, as JSON can spell it, stands for no character."""


class RecordStream(NamedTuple):
    """Records of one place, opened again for each reading."""

    name: str
    """Where the records are, for errors; also the name of records that bear none."""
    open: Callable[[], Iterable[Mapping[str, Any]]]
    content: Callable[[], str]
    """A hash of what is there."""
    place: Hashable
    """What is the same whatever the place is called."""


class Records(Source):
    """Documents made of records.

    A document's name is the record's ``title``, ``name`` or ``id``, whichever is filled first, else
    its place and its number there. Columns other than these and the text column are not looked at.

    Args:
        streams: where the records come from, in reading order.
        text_column: the column that holds a document's text; a record without it, or with an empty
            one, is an empty document.
        origin: the setting to name in errors.

    Raises:
        ConfigError: the text column is missing or empty in all records of a place or holds no text,
            or a record cannot be read.
    """

    def __init__(self, streams: Sequence[RecordStream], text_column: str, origin: Origin) -> None:
        super().__init__()
        self.streams = list(streams)
        self.text_column = text_column
        self.origin = origin
        self.replaced: set[str] = set()

    def entries(self) -> Iterator[Entry]:
        """The documents, in order."""
        seen: dict[str, bool] = {}
        for stream in self.streams:
            here: dict[str, Any] = {}
            count = 0
            for count, record in enumerate(self._read(stream), 1):
                if self.text_column not in here or not seen.get(self.text_column):
                    here.update(record)
                    _note_columns(seen, record)
                text = record.get(self.text_column)
                if text is not None and not isinstance(text, str):
                    what = f"column {self.text_column!r} holds {type(text).__name__}, not text"
                    raise self._no_text(what, _with_text(record))
                name = _record_name(record, f"{stream.name}-{count - 1:06d}")
                yield Entry(name, partial(self._text, name, text or ""))
            if count and self.text_column not in here:
                with_text = [name for name in here if seen[name]]
                others = [name for name in here if not seen[name]] if with_text else []
                raise self._no_text(f"no column {self.text_column!r}", with_text + others)
        if seen and not seen[self.text_column]:
            what = f"column {self.text_column!r} is empty in all records"
            raise self._no_text(what, [name for name in seen if seen[name]])

    def fingerprint(self) -> str:
        """Hash of the content and of the column that is read."""
        key = [RULES, self.text_column, *(stream.content() for stream in self.streams)]
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    def places(self) -> set[Hashable]:
        """The files or splits of datasets."""
        return {stream.place for stream in self.streams}

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read none of these files or splits."""
        self.streams = [stream for stream in self.streams if stream.place not in places]

    def lines(self) -> list[str]:
        """A line about documents with replaced bytes, as far as documents were read."""
        if not self.replaced:
            return []
        return [
            f"{self.origin.value}: U+FFFD, which stands for bytes that are not UTF-8, in "
            f"{len(self.replaced)} documents, e.g. {readable(min(self.replaced))}"
        ]

    def _text(self, name: str, text: str) -> str:
        text = HALF_PAIR.sub("\ufffd", text)
        if "\ufffd" in text:
            self.replaced.add(name)
        return text

    def _read(self, stream: RecordStream) -> Iterator[Mapping[str, Any]]:
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


def _with_text(record: Mapping[str, Any]) -> list[str]:
    return [name for name, value in record.items() if isinstance(value, str)]


def _note_columns(columns: dict[str, bool], record: Mapping[str, Any]) -> None:
    """Add a record's columns, and whether each held text so far."""
    for name, value in record.items():
        columns[name] = columns.get(name, False) or isinstance(value, str)


def _record_name(record: Mapping[str, Any], fallback: str) -> str:
    for column in NAME_COLUMNS:
        value = record.get(column)
        if value is not None and str(value):
            return str(value)
    return fallback
