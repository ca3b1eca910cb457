"""What datatrove writes opens as a source, and the scripts of docs/corpora.md run as printed."""

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
from memorizing_transformers.data.tokens.tokenizers import train_bpe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "corpora.md").read_text("utf-8")


def saved(script: str, config: str) -> tuple[str, str, str]:
    """What the page prints under two names, and the commands behind."""
    blocks = re.compile(r"^```(?:python|yaml|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    (code,) = blocks.findall(PAGE[PAGE.index(f"`{script}`") :])[:1]
    settings, commands = blocks.findall(PAGE[PAGE.index(f"Save this as `{config}`") :])[:2]
    return code, settings, commands


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


def run(folder: Path, script: str, config: str) -> None:
    """Save what the page prints, and run its commands."""
    code, settings, commands = saved(script, config)
    (folder / script).write_text(code)
    (folder / config).write_text(settings)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for command in commands.splitlines():
        words = [sys.executable, *command.split()[1:]]
        subprocess.run(words, cwd=folder, env=env, check=True, capture_output=True)


@pytest.mark.slow  # half a minute: four stages, each of processes of their own
@pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed")
def test_the_scripts_of_the_page_run_and_their_output_is_a_corpus(corpus, tmp_path) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(10**6, size=600).tolist())) for _ in range(24)]
    short, copied = "too short", texts[3]
    parts = [[*texts[:6], short], [copied, *texts[6:12]], texts[12:18], [short, *texts[18:]]]
    raw = [
        [{"id": f"{part}-{n}", "text": text} for n, text in enumerate(found)]
        for part, found in enumerate(parts)
    ]
    write_parts(tmp_path / "data" / "raw", raw, "jsonl.gz")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run(tmp_path, "clean.py", "clean.yaml")
    found = documents(prepare_store(corpus(tmp_path / "data/clean", **WHOLE), tmp_path / "cache"))
    # Of copies it keeps the one with the least number in its part.
    kept = [r for part in raw for r in part if r["text"] != short and r["id"] != "0-3"]
    assert list(found.items()) == [(r["id"], r["text"]) for r in kept]
    assert [*(tmp_path / "data" / "cache").glob("*/train.tokens.bin")]

    tokenizer = tmp_path / "data" / "tokenizer"
    train_bpe(texts, 300).save_pretrained(tokenizer)
    run(tmp_path, "tokenise.py", "tokens.yaml")
    options = {"tokenizer": str(tokenizer), **WHOLE}
    made, own = (
        TokenStore(prepare_store(corpus(tmp_path / source, **options), tmp_path / "cache"), "train")
        for source in ("data/tokens", "data/clean")
    )
    assert made.tokens.tolist() == own.tokens.tolist()
    assert made.offsets.tolist() == own.offsets.tolist()
    assert made.num_bytes.tolist() == own.num_bytes.tolist()
