"""Records: only text and names matter, whatever else is there and however it is packed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.settings import SPLITS, SourceSettings
from memorizing_transformers.data.sources import record_files
from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Document, Origin
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.sources.splits import fingerprint_sources, open_sources
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.errors import ConfigError, UserError


def read(value: object, column: str = "text", group: str = "file") -> list[Document]:
    source = open_files(Origin("data.source", str(value)), RecordRules(column), group)  # type: ignore[arg-type]
    return list(source.documents(lambda name: True))


def refusal(value: object, column: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        read(value, column)
    message = str(caught.value)
    assert "\n" not in message
    return message


def json_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


LATE = 3000
ODD_COLUMNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "null, then a string": lambda n: {"url": None if n < LATE else "https://example.org"},
    "a field that comes late": lambda n: {} if n < LATE else {"extra": 1},
    "an int, then a string": lambda n: {"year": 1895 if n < LATE else "unknown"},
    "nested otherwise": lambda n: {"meta": {"a": 1} if n < LATE else [{"b": [None, "x"]}]},
    "a date, then none": lambda n: {"title": "2020-01-01" if n < LATE else f"no date {n}"},
    "a name of any type": lambda n: {"name": n if n < LATE else f"name {n}"},
    "not finite": lambda n: {"score": float("nan" if n < LATE else "-inf")},
    "large": lambda n: {"number": 2**70 if n == LATE else 0},
}


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_other_columns_do_not_matter(tmp_path: Path, kind: str) -> None:
    records = [{"text": f"z{n} " * 40, **ODD_COLUMNS[kind](n)} for n in range(LATE + 2)]
    file = as_jsonl(tmp_path / "r", records)
    assert [document.text for document in read(file)] == [record["text"] for record in records]


def test_text_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    texts = ["2020-01-01", "2021-02-03T04:05:06Z", "17", "null", "true", "1e5"]
    (tmp_path / "r.jsonl").write_bytes(
        json_lines([{"text": text, "title": text} for text in texts])
    )
    assert read(tmp_path / "r.jsonl") == [Document(text, text) for text in texts]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_text_of_any_kind_of_parquet_column(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {n % 3}" for n in range(200)]
    columns = {"other": pa.array([{"a": [n]} for n in range(200)]), "id": pa.array(range(200))}
    table = pa.table({**columns, "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "r.parquet", row_group_size=70)
    assert read(tmp_path / "r.parquet") == [Document(str(n), text) for n, text in enumerate(texts)]


def as_jsonl(file: Path, records: list[dict[str, Any]]) -> Path:
    file.with_suffix(".jsonl").write_bytes(json_lines(records))
    return file.with_suffix(".jsonl")


def as_parquet(file: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
@pytest.mark.parametrize("text", [5, 1.5, True, ["a"], {"a": 1}, None])
def test_a_column_that_is_no_text_is_told_with_those_that_are(tmp_path, write, text) -> None:
    alone = [{"text": text}, {"text": text}]
    message = refusal(write(tmp_path / "alone", alone))
    assert "column 'text'" in message
    assert message.endswith("; the records have no text column")
    others = [{"text": text, "n": 3, "title": "t", "body": f"b{n}", "none": None} for n in range(3)]
    message = refusal(write(tmp_path / "others", others))
    assert message.endswith("; set data.text_column to one of title, body")
    missing = [{"n": 3, "deep": [1]}, {"n": 4, "deep": [2]}]
    message = refusal(write(tmp_path / "missing", missing))
    assert message.endswith("no column 'text'; the records have no text column")


def test_a_column_of_bytes_or_dates_is_told(tmp_path: Path) -> None:
    import datetime

    for value in (b"bytes", datetime.datetime(2020, 1, 1)):
        file = as_parquet(tmp_path / "r", [{"text": value, "body": "b"}])
        assert refusal(file).endswith("not text; set data.text_column to one of body")


def test_some_records_without_text_are_empty(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"id": 0, "text": None}, {"id": 1}, {"id": 2, "text": "x"}]
    file = as_jsonl(tmp_path / "r", records)
    assert read(file) == [Document("0", ""), Document("1", ""), Document("2", "x")]
    (tmp_path / "s.jsonl").write_bytes(json_lines([{"text": None}, {"text": None}]))
    assert len(read(tmp_path)) == 5
    (tmp_path / "t.jsonl").write_bytes(json_lines([{"url": "x"}]))
    assert "no column 'text'; set data.text_column to one of url" in refusal(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        [{"title": "same"}] * 20,
        [{"id": n % 4} for n in range(20)],
        [{"name": "a"}, {"name": "a (2)"}] * 10,
        [{"title": "x.txt"}] * 20,
        [{"title": "\ud83d"}, {"title": "\udce9"}] * 10,
    ],
)
def test_repeated_names_are_made_unique(corpus, tmp_path: Path, names: list[dict]) -> None:
    root = tmp_path / "r"
    root.mkdir()
    (root / "x.txt").write_text("some text")
    as_jsonl(root / "r", [{**name, "text": f"text {n}"} for n, name in enumerate(names)])
    assert len({document.name for document in read(root)}) == 21
    assert [document.text for document in read(root)][:20] == [f"text {n}" for n in range(20)]
    folder = prepare_store(corpus(root, validation_fraction=0.3), tmp_path / "cache")
    stored = [name for split in SPLITS for name in TokenStore(folder, split).names]
    assert len(stored) == len(set(stored)) == 21
    "".join(stored).encode("utf-8")


def test_an_id_of_zero_is_a_name(tmp_path: Path) -> None:
    for write in (as_jsonl, as_parquet):
        file = write(tmp_path / "r", [{"id": n, "text": "t"} for n in range(3)])
        assert [document.name for document in read(file)] == ["0", "1", "2"]


RECORDS = [{"title": f"t{n}", "text": f"text {n}"} for n in range(3)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps({"version": 1, "data": RECORDS}),
        json.dumps({"version": 1, "data": RECORDS, "tags": ["a"]}, indent=1),
        "\ufeff" + json.dumps({"rows": RECORDS}),
        "\n\n" + "\n\n".join(map(json.dumps, RECORDS)),
        "\r\n".join(map(json.dumps, RECORDS)),
    ],
)
def test_arrays_and_arrays_in_an_object_are_records(tmp_path, content: str, suffix: str) -> None:
    (tmp_path / f"r{suffix}").write_text(content, newline="")
    assert read(tmp_path) == [Document(r["title"], r["text"]) for r in RECORDS]


def test_one_record_is_one_record(tmp_path: Path) -> None:
    record = {"title": "t", "text": "x", "notes": [{"a": 1}]}
    for indent in (None, 2):
        (tmp_path / "r.json").write_text(json.dumps(record, indent=indent))
        assert read(tmp_path) == [Document("t", "x")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2"),
        ('\n{"text": "a"}\n["b"]\n', "record 3 is list"),
        ('"a"\n"b"\n', "record 1 is str"),
        ('["a", "b"]', "record 1 is str"),
        ('{"text" "a"}\n{"text": "b"}\n', "line 1"),
        ("12", "int"),
        ('[{"text": "a"}', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]]", "line 1"),
    ],
)
def test_what_is_no_record_is_told_with_its_place(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    message = refusal(tmp_path)
    assert "cannot read records of r.jsonl" in message
    assert told in message


def test_a_damaged_first_line_is_told_without_reading_on(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"text": "a" "b"}\n' + json_lines([{"text": "x" * 1000}]) * 3000)
    read_bytes = []

    class Spy(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            read_bytes.append(super().readinto(buffer))
            return read_bytes[-1]

        def readall(self) -> bytes:
            content = super().readall()
            read_bytes.append(len(content))
            return content

    monkeypatch.setattr(record_files, "open_bytes", lambda path: io.BufferedReader(Spy(path)))
    assert "line 1" in refusal(file)
    assert 0 < sum(read_bytes) < 100_000


def test_half_a_pair_is_a_replaced_character(tmp_path: Path) -> None:
    lines = ['{"text": "a \\ud83d b"}', '{"text": "\\ude00"}', '{"text": "\\ud83d\\ude00"}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    texts = [document.text for document in source.documents(lambda name: True)]
    assert texts == ["a \ufffd b", "\ufffd", "😀"]
    assert "in 2 documents" in source.report()[0]


def test_a_file_that_changes_under_its_name_is_read_again(tmp_path: Path) -> None:
    for write in (as_jsonl, as_parquet):
        for text in ("one", "two"):
            file = write(tmp_path / "r", [{"id": 1, "text": text}])
            assert read(file) == [Document("1", text)]


def test_no_folder_of_hugging_face_is_needed(tmp_path: Path, monkeypatch) -> None:
    import datasets

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("HF_HOME")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for write in (as_jsonl, as_parquet):
        assert len(read(write(tmp_path / "r", RECORDS))) == 3


def test_another_text_column_is_another_store(corpus, tmp_path: Path) -> None:
    for write in (as_jsonl, as_parquet):
        rows = [{"id": n, "text": f"text {n}", "body": f"body {n}"} for n in range(6)]
        file = write(tmp_path / "r", rows)
        seen = [
            fingerprint_sources(open_sources(SourceSettings(str(file), text_column=column)))
            for column in ("text", "body")
        ]
        assert seen[0] != seen[1]
        folders = [prepare_store(corpus(file, text_column=c), tmp_path) for c in ("text", "body")]
        assert folders[0] != folders[1]


def test_the_fingerprint_of_records_follows_names_and_content(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file").fingerprint()

    as_jsonl(tmp_path / "r", RECORDS)
    seen = [fingerprint()]
    as_jsonl(tmp_path / "r", RECORDS[::-1])
    seen.append(fingerprint())
    (tmp_path / "r.jsonl").rename(tmp_path / "s.jsonl")
    seen.append(fingerprint())
    as_jsonl(tmp_path / "t", RECORDS[:1])
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_an_unwritable_cache_of_the_hub_is_named(monkeypatch) -> None:
    import datasets

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/hf")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(ConfigError, match="set HF_HOME to a folder that can be written"):
        open_sources(SourceSettings("hub:owner/name"))
