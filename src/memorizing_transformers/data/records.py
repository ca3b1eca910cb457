"""Records with a text column as documents: JSON, JSON lines, Parquet, and datasets of the hub."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .documents import Document, Origin, Wanted, first_line
from .text_files import hash_file

NAME_COLUMNS = ("title", "name", "id")
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class RecordStream(NamedTuple):
    """Records of one place, opened anew for each reading."""

    place: str
    """Where the records stand, for errors; also the name of records that bear none."""
    open: Callable[[], Iterable[Mapping[str, Any]]]


class Records:
    """Documents made of records.

    A document's name is the record's ``title``, ``name`` or ``id``, whichever is filled first, else
    its place and its number there.

    Args:
        streams: where the records come from, in reading order.
        content: a hash of what the streams hold.
        text_column: the column that holds a document's text; an empty value is an empty document.
        origin: the setting to name in errors.

    Raises:
        ConfigError: the text column is missing or holds no text, or a record cannot be read.
    """

    def __init__(
        self,
        streams: Sequence[RecordStream],
        content: Callable[[], str],
        text_column: str,
        origin: Origin,
    ) -> None:
        self.streams = streams
        self.content = content
        self.text_column = text_column
        self.origin = origin
        self.replaced: set[str] = set()

    def names(self) -> Iterator[str]:
        """The documents' names, in order; this reads every record."""
        return (name for name, _ in self._records())

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """Read the wanted documents, one at a time."""
        for name, record in self._records():
            if wanted(name):
                text = self._text(record)
                if "\ufffd" in text:
                    self.replaced.add(name)
                yield Document(name, text)

    def fingerprint(self) -> str:
        """Hash of the content and of the column that is read."""
        key = f"{self.content()}\n{self.text_column}"
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def report(self) -> list[str]:
        """A line about documents with replaced bytes, as far as documents were read."""
        if not self.replaced:
            return []
        return [
            f"{self.origin.value}: U+FFFD, which stands for bytes that are not UTF-8, in "
            f"{len(self.replaced)} documents, e.g. {min(self.replaced)}"
        ]

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for stream in self.streams:
            for index, record in enumerate(self._read(stream)):
                yield _record_name(record, f"{stream.place}-{index:06d}"), record

    def _read(self, stream: RecordStream) -> Iterator[Mapping[str, Any]]:
        try:
            records = iter(stream.open())
        except StopIteration:
            return  # `datasets` says so of a file with no record
        except Exception as error:
            raise self._unreadable(stream, error) from error
        while True:
            # Every reader has its own errors (Arrow, gzip, zlib, the network), hence so wide a net.
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(stream, error) from error
            yield record

    def _unreadable(self, stream: RecordStream, error: Exception) -> Exception:
        return self.origin.error(
            f"cannot read records of {stream.place} ({first_line(error)}); mend or leave it out"
        )

    def _text(self, record: Mapping[str, Any]) -> str:
        if self.text_column not in record:
            raise self.origin.error(
                f"no column {self.text_column!r}; set data.text_column to one of "
                f"{', '.join(record)}"
            )
        text = record[self.text_column]
        if text is None:
            return ""
        if not isinstance(text, str):
            others = [column for column in record if column != self.text_column]
            raise self.origin.error(
                f"column {self.text_column!r} holds {type(text).__name__}, not text; set "
                f"data.text_column to one of {', '.join(others)}"
            )
        return text


def _record_name(record: Mapping[str, Any], fallback: str) -> str:
    for column in NAME_COLUMNS:
        value = record.get(column)
        if value is not None and str(value):
            return str(value)
    return fallback


def builder_of(file: Path) -> str | None:
    """The `datasets` builder that reads this kind of file, None for a text file."""
    return BUILDERS.get(_kind(file))


def is_plain_json(file: Path) -> bool:
    """Whether the file is ``.json``, which as often holds settings as records."""
    return _kind(file) == ".json"


def _kind(file: Path) -> str:
    """The suffix behind which no compression stands, in lower case; empty if there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def record_files(files: Sequence[Path], root: Path, text_column: str, origin: Origin) -> Records:
    """The records of JSON and Parquet files, streamed file by file.

    Args:
        files: in reading order; each of a kind that `builder_of` knows.
        root: the folder that names of records without a name are relative to.
        text_column: the column that holds the text.
        origin: the setting to name in errors.
    """

    def content() -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            digest.update(f"file {file.relative_to(root)}\n".encode("utf-8", "surrogateescape"))
            digest.update(hash_file(file, origin))
        return digest.hexdigest()

    streams = [
        RecordStream(file.relative_to(root).as_posix(), lambda file=file: _open_records(file))  # type: ignore[misc]
        for file in files
    ]
    return Records(streams, content, text_column, origin)


def _open_records(file: Path) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    # It prints a damaged line's error before raising it; ours says it once.
    logging.getLogger("datasets.packaged_modules.json.json").disabled = True
    builder = builder_of(file)
    assert builder is not None
    # Spelled otherwise than "utf-8", else the builder hands the bytes to Arrow unmended.
    options = {"encoding": "utf8", "encoding_errors": "replace"} if builder == "json" else {}
    return load_dataset(
        builder, data_files=[glob.escape(str(file))], split="train", streaming=True, **options
    )
