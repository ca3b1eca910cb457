"""Records by the values of their columns: what is read, what is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Origin, Source
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.sources.splits import fingerprint_sources, open_sources
from memorizing_transformers.errors import ConfigError

Write = Callable[[Path, list[dict[str, Any]]], Path]


def as_jsonl(file: Path, records: list[dict[str, Any]]) -> Path:
    file = file.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def as_parquet(file: Path, records: list[dict[str, Any]]) -> Path:
    file = file.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(records), file)
    return file


WRITERS = pytest.mark.parametrize("write", [as_jsonl, as_parquet])
RECORDS = [
    {
        "text": f"text {n}",
        "lang": ("C", "Python", "Rust")[n % 3],
        "stars": n,
        "licenses": ["mit"] if n % 2 else ["gpl-3.0", "mit"],
        "meta": {"set": "arxiv" if n < 4 else "books"},
        "unused": {"large": "x" * 50},
    }
    for n in range(9)
]


def opened(file: Path, **rules: Any) -> Source:
    return open_files(Origin("data.source", str(file)), RecordRules(**rules), "file")


def read_texts(source: Source) -> list[str]:
    return [document.text for document in source.documents(lambda name: True)]


@WRITERS
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"lang": "C"}, [0, 3, 6]),
        ({"lang": ["C", "Rust"]}, [0, 2, 3, 5, 6, 8]),
        ({"lang": "C", "meta.set": "arxiv"}, [0, 3]),
        ({"licenses": "gpl-3.0"}, [0, 2, 4, 6, 8]),
        ({"stars": [1, 8]}, [1, 8]),
    ],
)
def test_only_records_with_the_values_are_read(tmp_path, write: Write, where, kept) -> None:
    source = opened(write(tmp_path / "r", RECORDS), where=where)
    assert read_texts(source) == [f"text {n}" for n in kept]
    # Names tell the place in the file, whatever is left out before.
    suffix = ".jsonl" if write is as_jsonl else ".parquet"
    assert list(source.names()) == [f"r{suffix}-{n:06d}" for n in kept]
    (line,) = source.report()
    assert line.endswith(f"{9 - len(kept)} of 9 records left out by data.where")


@WRITERS
def test_a_filter_that_keeps_nothing_shows_values(tmp_path: Path, write: Write) -> None:
    source = opened(write(tmp_path / "r", RECORDS), where={"lang": "c"})
    with pytest.raises(ConfigError) as caught:
        read_texts(source)
    message = str(caught.value)
    assert message.startswith("data.where = {'lang': 'c'}: keeps no record of ")
    assert message.endswith("; lang holds 'C', 'Python', 'Rust'")


@WRITERS
def test_a_filter_of_an_unknown_column_is_refused(tmp_path: Path, write: Write) -> None:
    for where in ({"language": "C"}, {"meta.name": "arxiv"}, {"language": None}):
        source = opened(write(tmp_path / "r", RECORDS), where=where)
        with pytest.raises(ConfigError, match=f"has no column '{next(iter(where))}'"):
            read_texts(source)


def test_a_long_value_is_shown_in_part_and_few_of_many(tmp_path: Path) -> None:
    records = [{"text": "t", "kind": "x" * 500 + str(n)} for n in range(30)]
    source = opened(as_jsonl(tmp_path / "r", records), where={"kind": "y"})
    with pytest.raises(ConfigError) as caught:
        read_texts(source)
    assert len(str(caught.value)) < 600
    assert str(caught.value).endswith(", …")


def test_columns_of_records_left_out_do_not_matter(tmp_path: Path) -> None:
    records = [{"kind": "a", "body": 5}, {"kind": "b", "text": "x"}]
    source = opened(as_jsonl(tmp_path / "r", records), where={"kind": "b"})
    assert read_texts(source) == ["x"]


def test_a_second_reading_counts_anew(tmp_path: Path) -> None:
    source = opened(as_jsonl(tmp_path / "r", RECORDS), where={"lang": "C"})
    for _ in range(2):
        list(source.names())
    assert source.report()[0].endswith("6 of 9 records left out by data.where")


def test_only_the_columns_in_use_are_read_of_parquet(tmp_path: Path, monkeypatch) -> None:
    asked = []
    iterate = pq.ParquetFile.iter_batches

    def spy(self: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return iterate(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    file = as_parquet(tmp_path / "r", RECORDS)
    read_texts(opened(file, where={"meta.set": "arxiv"}, group_column="lang", sort_column="stars"))
    assert set(map(tuple, asked)) == {("text", "lang", "stars", "meta")}


def test_another_filter_is_another_corpus(tmp_path: Path) -> None:
    file = as_jsonl(tmp_path / "r", RECORDS)
    prints = {
        fingerprint_sources(open_sources(SourceSettings(str(file), where=where)))
        for where in (None, {"lang": "C"}, {"lang": ["C", "Rust"]}, {"lang": "Rust"})
    }
    assert len(prints) == 4


def test_no_filter_is_the_corpus_of_before(tmp_path: Path) -> None:
    file = as_jsonl(tmp_path / "r", RECORDS)
    plain = fingerprint_sources(open_sources(SourceSettings(str(file))))
    assert fingerprint_sources(open_sources(SourceSettings(str(file), where={}))) == plain


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"where": {"a": 1}}, "data.where = {'a': 1}: the standard library is no records"),
        (
            {"source": "texts", "where": {"a": 1}},
            "data.where = {'a': 1}: is for records, but texts holds texts",
        ),
        (
            {"source": "texts", "group": "isabelle", "where": {"a": 1}},
            "is for records, but data.group = 'isabelle' reads every file as text",
        ),
        (
            {"source": "texts", "group": "folder", "where": {"a": 1}},
            "is for records, but data.group = 'folder' reads every file as text",
        ),
    ],
)
def test_rules_for_records_where_there_are_none_are_refused(
    texts: Path, monkeypatch, settings: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(texts.parent)
    with pytest.raises(ConfigError) as caught:
        open_sources(SourceSettings(**settings))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_held_out_source_may_be_text(texts: Path, tmp_path: Path) -> None:
    file = as_jsonl(tmp_path / "r", RECORDS)
    settings = SourceSettings(
        str(file), validation_source=str(texts), test_fraction=0, where={"lang": "C"}
    )
    assert len(open_sources(settings)) == 2
