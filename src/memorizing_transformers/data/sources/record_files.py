"""Files of records: JSON, JSON lines and Parquet, read one after the other and never guessed at.

The types of columns are those of each value; no file's first part decides what the rest must be.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .columns import Record, RecordRules
from .compression import kind_of, open_bytes
from .documents import Origin, readable
from .files import FoundFile, place_of
from .records import RecordStream
from .text_files import hash_file

BATCH_ROWS = 64
_decode = json.JSONDecoder(strict=False).decode


def record_files(
    files: Sequence[FoundFile], rules: RecordRules, origin: Origin
) -> list[RecordStream]:
    """The streams of some files.

    Args:
        files: in reading order; each of a kind of `READERS`.
        rules: the columns that are looked at.
        origin: the setting to name in errors.
    """
    return [
        RecordStream(
            name=file.name,
            open=partial(READERS[kind_of(file.path)], file.path, rules),
            content=partial(_content, file, origin),
            place=place_of(file.path),
        )
        for file in files
    ]


def _content(file: FoundFile, origin: Origin) -> str:
    return f"{readable(file.name)} {hash_file(file.path, origin).hex()}"


def read_json(file: Path, rules: RecordRules) -> Iterator[Record]:
    """The records of JSON lines, of a JSON array, or of an array that one object holds.

    Raises:
        ValueError: the line that is no JSON, or what is there in place of records.
    """
    with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", errors="replace") as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        number, line = next(lines, (0, ""))
        if not line:
            return
        try:
            first = _decode(line)
        except json.JSONDecodeError as error:
            if error.pos < len(line.rstrip()):
                raise ValueError(f"line {number}: {error}") from error
            # The line is the beginning of a value that ends further down.
            yield from _records_of(_decode(line + stream.read()), rules)
            return
        following = next(lines, None)
        if following is None:
            yield from _records_of(first, rules)
            return
        yield _checked(first, number)
        while following is not None:
            number, line = following
            try:
                record = _decode(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield _checked(record, number)
            following = next(lines, None)


def _records_of(value: Any, rules: RecordRules) -> Iterator[Record]:
    """The records of a file that is one value."""
    if isinstance(value, dict):
        arrays = [item for item in value.values() if _is_array_of_records(item)]
        alone = any(name in value for name in rules.text.tops) or len(arrays) != 1
        value = [value] if alone else arrays[0]
    if not isinstance(value, list):
        raise ValueError(f"holds {type(value).__name__}, not records")
    for number, record in enumerate(value, 1):
        yield _checked(record, number)


def _is_array_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _checked(record: Any, number: int) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"record {number} is {type(record).__name__}, not an object")
    return record


def read_parquet(file: Path, rules: RecordRules) -> Iterator[Record]:
    """The records of a Parquet file, with the columns that are needed and no others.

    Where a column is missing or the text column holds no text, every column is read, so that an
    error can name them.
    """
    import pyarrow.parquet as pq

    if file.stat().st_size == 0:
        return
    # Opened here: Arrow takes no name that is not UTF-8.
    with open(file, "rb") as stream, pq.ParquetFile(stream) as table:
        schema = table.schema_arrow
        known = [name for name in rules.names if name in schema.names]
        plain = rules.text.name in known
        has_text = (
            _is_text(schema.field(rules.text.name).type)
            if plain
            else rules.text.list_path[0] in known
        )
        complete = all(any(name in known for name in column.tops) for column in rules.used)
        columns = known if has_text and complete else None
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


READERS: dict[str, Callable[[Path, RecordRules], Iterator[Record]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}
