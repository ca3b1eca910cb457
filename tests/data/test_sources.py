"""Text sources: what becomes a document, which split it goes to, and what a user is told."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.documents import Document, Origin
from memorizing_transformers.data.local import open_files
from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources import (
    fingerprint_sources,
    open_sources,
    split_by_name,
)
from memorizing_transformers.data.standard_library import TEST, VALIDATION, standard_library
from memorizing_transformers.errors import ConfigError, UserError

RECORDS = [{"title": f"book {n}", "text": f"text of book {n}\n" * 3} for n in range(5)]


def read(value: object, column: str = "text", group: str = "file") -> list[Document]:
    source = open_files(Origin("data.source", str(value)), column, group)  # type: ignore[arg-type]
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


def split_names(settings: SourceSettings) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for reading in open_sources(settings):
        for document in reading.source.documents(lambda name: True):
            splits.setdefault(reading.split_of(document.name), []).append(document.name)
    return splits


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
    source = open_files(Origin("data.source", str(tmp_path)), "text", "file")
    assert list(source.names()) == ["a.txt"]
    assert source.report() == [f"{tmp_path}: 1 files left out, they look binary"]
    (tmp_path / "a.txt").unlink()
    assert "1 files look binary" in refusal(tmp_path)


def test_bytes_that_are_not_utf8_are_replaced_and_counted_once(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"gr\xfc\xdfe")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "bad.jsonl").write_bytes(b'{"title": "t", "text": "gr\xfc"}\n')
    source = open_files(Origin("data.source", str(tmp_path)), "text", "file")
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
    source = open_files(Origin("data.source", str(tmp_path)), "text", "file")
    monkeypatch.setattr(source, "_read_text", lambda file: f"read {file.name}")
    assert list(source.documents(lambda name: name == "b")) == [Document("b", "read b")]


def test_documents_are_read_one_at_a_time(texts: Path, monkeypatch) -> None:
    source = open_files(Origin("data.source", str(texts)), "text", "file")
    count = 0

    def read_text(file: Path) -> str:
        nonlocal count
        count += 1
        return ""

    monkeypatch.setattr(source, "_read_text", read_text)
    documents = source.documents(lambda name: True)
    assert count == 0
    next(documents)
    next(documents)
    assert count == 2


def test_a_documents_split_is_its_own(texts: Path) -> None:
    shares = {"validation": 0.2, "test": 0.2}
    names = [f"document {n}" for n in range(500)]
    origin = Origin("data.source", "x")
    all_of_them = split_by_name(names, shares, origin)
    half = split_by_name(names[::2], shares, origin)
    splits = [all_of_them(name) for name in names]
    assert splits[::2] == [half(name) for name in names[::2]]
    assert splits.count("validation") == pytest.approx(100, abs=35)
    assert splits.count("test") == pytest.approx(100, abs=35)


@pytest.mark.parametrize("count", range(3, 12))
def test_every_split_gets_a_document(count: int) -> None:
    names = [f"n{n}" for n in range(count)]
    for shares in (
        {"validation": 0.05, "test": 0.05},
        {"validation": 0.49, "test": 0.49},
        {"test": 0.001},
    ):
        splits = [split_by_name(names, shares, Origin("data.source", "x"))(n) for n in names]
        assert set(splits) == {"train", *shares}
        again = split_by_name(reversed(names), shares, Origin("data.source", "x"))
        assert splits == [again(name) for name in names]


def test_too_few_documents_to_split_are_told(texts: Path) -> None:
    file = texts / "text00.txt"
    with pytest.raises(UserError, match="1 documents, too few to cut off validation and test"):
        open_sources(SourceSettings(str(file)))
    whole = SourceSettings(str(file), validation_fraction=0, test_fraction=0)
    assert split_names(whole) == {"train": ["text00.txt"]}


def test_given_sources_are_not_cut(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("validation")
    settings = SourceSettings(str(texts), validation_source=str(tmp_path / "val.txt"))
    splits = split_names(settings)
    assert splits["validation"] == ["val.txt"]
    assert len(splits["train"]) + len(splits["test"]) == 12
    with pytest.raises(ConfigError, match=r"^data\.test_source = 'nowhere'"):
        open_sources(SourceSettings(str(texts), test_source="nowhere"))


def fingerprint(settings: SourceSettings) -> str:
    return fingerprint_sources(open_sources(settings))


def test_the_fingerprint_follows_content_names_and_rules(texts: Path, tmp_path: Path) -> None:
    seen = {fingerprint(SourceSettings(str(texts)))}
    assert fingerprint(SourceSettings(str(texts))) in seen
    moved = tmp_path / "elsewhere"
    texts.rename(moved)
    assert fingerprint(SourceSettings(str(moved))) in seen
    for change in (
        lambda: (moved / "text03.txt").write_text("changed"),
        lambda: (moved / "text04.txt").rename(moved / "renamed.txt"),
        lambda: (moved / "text05.txt").unlink(),
    ):
        change()
        new = fingerprint(SourceSettings(str(moved)))
        assert new not in seen
        seen.add(new)
    for options in ({"test_fraction": 0.2}, {"group": "folder"}, {"validation_source": str(moved)}):
        settings = SourceSettings(str(moved), **options)
        if options != {"group": "folder"}:  # the same documents here, whichever way
            assert fingerprint(settings) not in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "repository"}, "data.group = 'repository': must be 'file' or 'folder'"),
        ({"test_fraction": 1.0}, "data.test_fraction = 1.0: must be at least 0 and below 1"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "data.test_fraction = 0.4: leaves"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SourceSettings(**options)
    assert str(caught.value).startswith(message)


def test_the_standard_library_is_split_by_package() -> None:
    (reading,) = open_sources(SourceSettings())
    sizes: dict[str, dict[str, int]] = {}
    for document in reading.source.documents(lambda name: True):
        sizes.setdefault(reading.split_of(document.name), {})[document.name] = len(document.text)
    assert set(sizes["validation"]) == set(VALIDATION)
    assert set(sizes["test"]) == set(TEST)
    total = sum(sum(split.values()) for split in sizes.values())
    for split in ("validation", "test"):
        assert 0.03 < sum(sizes[split].values()) / total < 0.08
        assert max(sizes[split].values()) > 100_000
    assert len(sizes["train"]) > 100
    assert {"site-packages", "test", "__pycache__"}.isdisjoint(sizes["train"])


def test_the_standard_librarys_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    for name in (
        "argparse.py",
        "json/__init__.py",
        "json/tool.py",
        "json/tests/test_json.py",
        "test/test_json.py",
        "site-packages/numpy/__init__.py",
        "lib-dynload/math.so",
        "_sysconfigdata_linux.py",
        "sitecustomize.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    source = standard_library(Origin("data.source", "stdlib"), tmp_path)
    assert list(source.documents(lambda name: True)) == [
        Document("argparse", "argparse.py\n"),
        Document("json", "json/__init__.py\njson/tool.py\n"),
    ]
    with pytest.raises(ConfigError, match="no Python source"):
        standard_library(Origin("data.source", "stdlib"), tmp_path / "nowhere")


@pytest.fixture
def hub(monkeypatch) -> dict:
    """A stand-in for the hub: a dictionary of splits, and the calls made."""
    stand_in: dict = {"splits": {}, "calls": [], "hash": "abc"}

    class Builder:
        hash = property(lambda self: stand_in["hash"])

    def load_dataset(path, config=None, **options):
        stand_in["calls"].append((path, config, options))
        return {
            name: datasets.Dataset.from_list(records).to_iterable_dataset()
            for name, records in stand_in["splits"].items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: Builder())
    return stand_in


def test_a_hub_dataset_is_streamed_with_its_own_splits(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS[:3], "dev": RECORDS[3:4], "test": RECORDS[4:]}
    splits = split_names(SourceSettings("hub:owner/books:english@v2"))
    assert splits == {
        "train": ["book 0", "book 1", "book 2"],
        "validation": ["book 3"],
        "test": ["book 4"],
    }
    assert hub["calls"] == [("owner/books", "english", {"revision": "v2", "streaming": True})]


def test_a_hub_dataset_without_splits_is_cut(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS, "validation": RECORDS[:1]}
    splits = split_names(SourceSettings("hub:owner/books"))
    assert splits["validation"] == ["book 0"]
    assert len(splits["test"]) >= 1
    assert sorted(splits["test"] + splits["train"]) == [r["title"] for r in RECORDS]


def test_a_hub_dataset_may_be_the_validation_source(hub: dict, texts: Path) -> None:
    hub["splits"] = {"train": RECORDS, "validation": RECORDS[:2]}
    settings = SourceSettings(str(texts), validation_source="hub:owner/books")
    assert split_names(settings)["validation"] == ["book 0", "book 1"]


def test_a_hub_datasets_fingerprint_follows_its_revision(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS}
    first = fingerprint(SourceSettings("hub:owner/books"))
    assert first == fingerprint(SourceSettings("hub:owner/books"))
    assert first != fingerprint(SourceSettings("hub:owner/books:english"))
    hub["hash"] = "def"
    assert first != fingerprint(SourceSettings("hub:owner/books"))


def test_hub_mistakes_are_told_in_one_line(hub: dict, monkeypatch) -> None:
    hub["splits"] = {"dev": RECORDS}
    with pytest.raises(ConfigError, match="has no split for train, only dev"):
        open_sources(SourceSettings("hub:owner/books"))
    with pytest.raises(ConfigError, match="names no dataset"):
        open_sources(SourceSettings("hub:"))

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ConfigError, match="ConnectionError: Couldn't reach the Hub") as caught:
        open_sources(SourceSettings("hub:owner/books"))
    assert "\n" not in str(caught.value)


def test_reading_text_needs_neither_torch_nor_lightning() -> None:
    import subprocess

    code = (
        "import sys, memorizing_transformers.data.prepare; "
        "sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
