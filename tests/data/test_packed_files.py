"""Compressed files and empty shards: read wherever a text passes, or named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Document, Origin
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.errors import UserError

RECORDS = [{"title": f"t{n}", "text": f"text {n}"} for n in range(3)]


def read(value: object, group: str = "file") -> list[Document]:
    source = open_files(Origin("data.source", str(value)), RecordRules(), group)  # type: ignore[arg-type]
    return list(source.documents(lambda name: True))


def json_lines(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zst(content: bytes) -> bytes:
    """Two frames, as tools that pack in parallel write them."""
    half = len(content) // 2
    parts = (content[:half], content[half:])
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)


def two_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


PACKING: dict[str, Callable[[bytes], bytes]] = {
    ".gz": two_members, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst,
}  # fmt: skip


def empty_parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("group", ["file", "folder"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.jsonl", b""), ("e.jsonl", b"\n \n"), ("e.json", b"[]"), ("e.jsonl", b"\xef\xbb\xbf"),
        *((f"e.jsonl{suffix}", pack(b"")) for suffix, pack in PACKING.items()),
        *((f"e.{kind}{suffix}", b"") for suffix in PACKING for kind in ("jsonl", "txt", "json")),
        ("e.parquet", b""),
        ("e.parquet", empty_parquet({})),
        ("e.parquet", empty_parquet({"text": pa.array([], pa.string())})),
        ("e.parquet", empty_parquet({"other": pa.array([], pa.int8())})),
    ],
)  # fmt: skip
def test_empty_shards_add_nothing(tmp_path: Path, name: str, content: bytes, group: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(RECORDS))
    (tmp_path / "z.jsonl").write_bytes(json_lines([{"title": "last", "text": "last"}]))
    (tmp_path / name).write_bytes(content)
    if group == "file":
        documents = [document for document in read(tmp_path) if document.text]
        assert [document.name for document in documents] == ["t0", "t1", "t2", "last"]
    elif not name.endswith("parquet"):
        assert len(read(tmp_path, group="folder")) == 3


@pytest.mark.parametrize("packing", PACKING)
def test_packed_files_are_read_everywhere(tmp_path: Path, packing: str) -> None:
    pack, text = PACKING[packing], "ein Buch, süß\n" * 4000
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / f"a.txt{packing}").write_bytes(pack(text.encode()))
    (tmp_path / f"b.md{packing.upper()}").write_bytes(pack(text.encode()))
    (tmp_path / f"c.jsonl{packing}").write_bytes(pack(json_lines(RECORDS * 50)))
    (tmp_path / f"d.bin{packing}").write_bytes(pack(b"\0" + text.encode()))
    documents = {document.name: document.text for document in read(tmp_path)}
    assert documents[f"one/a.txt{packing}"] == documents[f"b.md{packing.upper()}"] == text
    assert len(documents) == 152
    assert documents["t2 (50)"] == "text 2"
    grouped = {document.name: document.text for document in read(tmp_path, group="folder")}
    assert grouped["one"] == text
    assert f"d.bin{packing}" not in grouped


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_packed_file_that_is_cut_off_is_named(tmp_path: Path, kind: str, packing: str) -> None:
    content = json_lines([{"text": str(random.Random(n).random()) * 9} for n in range(20_000)])
    packed = PACKING[packing](content)
    name = f"r.{kind}{packing}"
    for length in (3, len(packed) // 3, len(packed) - 1):
        (tmp_path / name).write_bytes(packed[:length])
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
