"""What datatrove writes opens as a source, and the script of docs/corpora.md runs as printed."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "corpora.md").read_text("utf-8")
(SCRIPT,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SAVED = PAGE[PAGE.index("Save this as `clean.yaml`") :]
CONFIG, COMMANDS = re.findall(r"^```(?:yaml|bash)\n(.*?)^```", SAVED, re.DOTALL | re.MULTILINE)[:2]


def record(number: int, language: str = "en", source: str = "a") -> dict[str, Any]:
    """A document as datatrove writes it."""
    metadata = {"file_path": "data/raw/00000.jsonl", "language": language, "repository": source}
    return {"text": f"text {number} " * 20, "id": f"doc/{number}", "metadata": metadata}


def write_parts(folder: Path, parts: list[list[dict[str, Any]]], kind: str) -> Path:
    folder.mkdir(parents=True)
    for number, records in enumerate(parts):
        if kind == "parquet":
            table = pa.Table.from_pylist(records)
            pq.write_table(table, folder / f"{number:05d}.parquet")
            continue
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{number:05d}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def documents(folder: Path) -> dict[str, str]:
    """Names and texts of the training documents, in order, of a store of bytes."""
    store = TokenStore(folder, "train")
    texts = (store.document(index).astype("u1").tobytes().decode() for index in range(len(store)))
    return dict(zip(store.names, texts, strict=True))


WHOLE = {"validation_fraction": 0, "test_fraction": 0}


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_parts_are_read_in_order_under_the_ids(corpus, tmp_path, kind) -> None:
    parts = [[record(2), record(0)], [record(3)], [record(1)]]
    source = write_parts(tmp_path / "clean", parts, kind)
    expected = {r["id"]: r["text"] for part in parts for r in part}
    found = documents(prepare_store(corpus(source, **WHOLE), tmp_path / "cache"))
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_metadata_filters_groups_and_sorts(corpus, tmp_path, kind) -> None:
    parts = [[record(2, source="x"), record(0, "de")], [record(1, source="x"), record(3)]]
    source = write_parts(tmp_path / "clean", parts, kind)
    rules = {
        "where": {"metadata.language": "en"},
        "group_column": "metadata.repository",
        "sort_column": "id",
    }
    found = documents(prepare_store(corpus(source, **rules, **WHOLE), tmp_path / "cache"))
    assert found == {"a": record(3)["text"],
                     "x": f"{record(1)['text']}\n{record(2)['text']}\n"}  # fmt: skip


@pytest.mark.parametrize("what", ["folder", "file"])
def test_files_of_tokens_are_refused(corpus, tmp_path, what) -> None:
    """They would hold no NUL where all ids are above 255, and `.metadata` is text."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    file = folder / "00000_unshuffled.ds"
    np.full(2000, 0x4142, "<u2").tofile(file)
    np.asarray([1000, 2000], "<u8").tofile(f"{file}.index")
    Path(f"{file}.metadata").write_text("tokenizer.json|2\n2000\n2 kT")
    with pytest.raises(ConfigError, match=r"00000_unshuffled\.ds holds tokens.*give the JSON"):
        prepare_store(corpus(folder if what == "folder" else file), tmp_path / "cache")


def test_a_text_whose_name_ends_alike_is_a_text(corpus, tmp_path) -> None:
    (tmp_path / "notes.ds").write_text("some text")
    folder = prepare_store(corpus(tmp_path / "notes.ds", **WHOLE), tmp_path / "cache")
    assert documents(folder) == {"notes.ds": "some text"}


@pytest.mark.slow  # half a minute: four stages, each of processes of their own
@pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed")
def test_the_script_of_the_page_runs_and_its_output_is_a_corpus(corpus, tmp_path) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(10**6, size=600).tolist())) for _ in range(24)]
    short, copied = "too short", texts[3]
    parts = [[*texts[:6], short], [copied, *texts[6:12]], texts[12:18], [short, *texts[18:]]]
    raw = [
        [{"id": f"{part}-{n}", "text": text} for n, text in enumerate(found)]
        for part, found in enumerate(parts)
    ]
    write_parts(tmp_path / "data" / "raw", raw, "jsonl.gz")
    (tmp_path / "clean.py").write_text(SCRIPT)
    (tmp_path / "clean.yaml").write_text(CONFIG)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for command in COMMANDS.splitlines():
        words = [sys.executable, *command.split()[1:]]
        subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True)
    found = documents(prepare_store(corpus(tmp_path / "data/clean", **WHOLE), tmp_path / "cache"))
    # Of copies it keeps the one with the least number in its part.
    kept = [r for part in raw for r in part if r["text"] != short and r["id"] != "0-3"]
    assert list(found.items()) == [(r["id"], r["text"]) for r in kept]
    assert [*(tmp_path / "data" / "cache").glob("*/train.tokens.bin")]
