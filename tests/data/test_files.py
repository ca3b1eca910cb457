"""Local files: what becomes a document, and what a user is told."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Document, Origin
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.errors import ConfigError

RECORDS = [{"title": f"book {n}", "text": f"text of book {n}\n" * 3} for n in range(5)]


def read(value: object, column: str = "text", group: str = "file") -> list[Document]:
    source = open_files(Origin("data.source", str(value)), RecordRules(column), group)  # type: ignore[arg-type]
    documents = list(source.documents(lambda name: True))
    assert [document.name for document in documents] == list(source.names())
    return documents


def refusal(value: object, column: str = "text", group: str = "file") -> str:
    with pytest.raises(ConfigError) as caught:
        read(value, column, group)
    message = str(caught.value)
    assert message.startswith(f"data.source = '{value}': ")
    assert "\n" not in message
    return message


def json_lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "json", "json array", "parquet"]
)
def test_records_are_documents(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"books.{kind.split()[0]}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), file)
    elif kind == "json array":
        file.write_text(json.dumps(RECORDS))
    else:
        compress = {"jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress}.get(kind, bytes)
        file.write_bytes(compress(json_lines(RECORDS)))
    assert read(file) == [Document(r["title"], r["text"]) for r in RECORDS]


def test_records_take_their_name_from_the_first_filled_column(tmp_path: Path) -> None:
    file = tmp_path / "[odd] name.jsonl"
    records = [
        {"id": 7, "name": "n", "title": None, "body": "a"},
        {"id": 8, "name": "", "title": None, "body": None},
        {"id": None, "name": None, "title": None, "body": "c"},
    ]
    file.write_bytes(json_lines(records))
    assert read(file, "body") == [
        Document("n", "a"),
        Document("8", ""),
        Document("[odd] name.jsonl-000002", "c"),
    ]


def test_a_wrong_text_column_is_told_with_the_right_ones(tmp_path: Path) -> None:
    file = tmp_path / "books.jsonl"
    file.write_bytes(json_lines([{"title": "x", "body": "words", "year": 1895}]))
    assert "no column 'text'; set data.text_column to one of title, body, year" in refusal(file)
    message = refusal(file, "year")
    assert (
        "column 'year' holds int, not text; set data.text_column to one of title, body" in message
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(json_lines(RECORDS * 50))[:60]),
        ("fake.jsonl.gz", json_lines(RECORDS)),
        ("cut.jsonl", json_lines(RECORDS)[:-20] + b"\n"),
        ("fake.parquet", b"no parquet at all"),
        ("cut.txt.gz", gzip.compress(bytes(range(1, 256)) * 99)[:60]),
        ("fake.txt.gz", b"no archive"),
    ],
)
def test_damaged_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path / name)


def test_a_file_without_records_has_no_document(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert read(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize("form", ["folder", "glob", "deep glob"])
def test_text_files_are_documents_in_path_order(tmp_path: Path, form: str) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", "a.txt/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    value = tmp_path / {"folder": "", "glob": "*/*.txt", "deep glob": "**/*.txt"}[form]
    names = {
        "folder": ["a/y.md", "a/z.txt", "a.txt/x.txt", "b.txt"],
        "glob": ["a/z.txt", "a.txt/x.txt"],
        "deep glob": ["a/z.txt", "a.txt/x.txt", "b.txt"],
    }[form]
    assert read(value) == [Document(name, f"text of {name}") for name in names]


def test_one_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("über\r\nzwei\n".encode()))
    assert read(tmp_path / "book.txt.gz") == [Document("book.txt.gz", "über\r\nzwei\n")]


def test_folders_are_joined_as_repositories(tmp_path: Path) -> None:
    for name, text in {
        "two/b.py": "b",
        "two/a/z.py": "z\n",
        "two/settings.json": "{}\n",
        "one/x.py": "x",
        "alone.py": "alone",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read(tmp_path, group="folder") == [
        Document("alone.py", "alone"),
        Document("one", "x"),
        Document("two", "z\nb\n{}\n"),
    ]


def test_json_among_other_files_is_text_and_json_lines_are_records(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "settings"}')
    (tmp_path / "main.js").write_text("code")
    (tmp_path / "books.jsonl").write_bytes(json_lines(RECORDS[:1]))
    names = [document.name for document in read(tmp_path)]
    assert names == ["book 0", "main.js", "package.json"]


def test_binary_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"head\0tail")
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    assert list(source.names()) == ["a.txt"]
    assert source.report() == [f"{tmp_path}: 1 files left out, they look binary"]
    (tmp_path / "a.txt").unlink()
    assert "1 files look binary" in refusal(tmp_path)


def test_bytes_that_are_not_utf8_are_replaced_and_counted_once(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"gr\xfc\xdfe")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "bad.jsonl").write_bytes(b'{"title": "t", "text": "gr\xfc"}\n')
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    for _ in range(2):
        texts = {document.name: document.text for document in source.documents(lambda name: True)}
    assert texts == {"bad.txt": "gr\ufffd\ufffde", "mark.txt": "text", "t": "gr\ufffd"}
    lines = source.report()
    assert len(lines) == 2
    assert any("replaced by U+FFFD in 1 files" in line for line in lines)


def test_places_without_text_are_told(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "the glob matches no file" in refusal(tmp_path / "*.txt")
    assert "the folder holds no file" in refusal(tmp_path)


def test_only_wanted_text_files_are_read(tmp_path: Path, monkeypatch) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    monkeypatch.setattr(source, "read_text", lambda file: f"read {file.name}")
    assert list(source.documents(lambda name: name == "b")) == [Document("b", "read b")]


def test_documents_are_read_one_at_a_time(texts: Path, monkeypatch) -> None:
    source = open_files(Origin("data.source", str(texts)), RecordRules(), "file")
    count = 0

    def read_text(file: Path) -> str:
        nonlocal count
        count += 1
        return ""

    monkeypatch.setattr(source, "read_text", read_text)
    documents = source.documents(lambda name: True)
    assert count == 0
    next(documents)
    next(documents)
    assert count == 2
