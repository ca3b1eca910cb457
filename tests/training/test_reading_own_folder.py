"""A run whose source holds everything that the program writes, and names that are not UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import command, write_config, write_texts

from memorizing_studies import commands
from memorizing_transformers import __main__ as core
from memorizing_transformers.data.tokens.store import TokenStore


def stores(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").iterdir() if path.is_dir())


def test_the_program_never_reads_what_it_writes(tmp_path: Path, monkeypatch) -> None:
    config = write_config(tmp_path / "config.yaml", Path("."), Path("runs"))
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    here = ["--config", config, "--data.cache_dir", "cache", "--trainer.max_steps"]
    assert command("fit", *here, 8, "--final_report", "true")[0] == 0
    first = stores(tmp_path)
    assert command("fit", *here, 12, "--ckpt_path", "last")[0] == 0
    for name in ("test", "predict"):
        assert command(name, *here, 8, "--ckpt_path", "last")[0] == 0
    assert command("predict", *here, 8, "--ckpt_path", "last", "--trainer.logger", "false")[0] == 0
    checkpoint = "runs/version_0/checkpoints/last.ckpt"
    core.export(checkpoint, "model")
    commands.inspect(checkpoint, "texts/story00.txt", "report")
    assert command("fit", *here, 8)[0] == 0
    assert len(first) == 1
    assert stores(tmp_path) == first
    names = TokenStore(tmp_path / "cache" / first[0], "train").names
    assert all(name.startswith("texts/") or name == "config.yaml" for name in names)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_names_that_are_not_utf8_come_out_of_predict(texts: Path, tmp_path, split: str) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for file in texts.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    held = tmp_path / "held"
    held.mkdir()
    (held / os.fsdecode(b"caf\xe9.txt")).write_text("alpha beta " * 60)
    config = write_config(tmp_path / "config.yaml", root, tmp_path / "runs")
    data = [f"--data.{split}_source", held, "--data.predict_split", split]
    code, _, errors = command("predict", "--config", config, *data)
    assert code == 0, errors
    folder = tmp_path / "runs" / "predict" / "version_0"
    for name in ("predictions", "documents"):
        table = pq.read_table(folder / f"{name}.parquet")
        assert set(table["document"].to_pylist()) == {"caf\\xe9.txt"}
