"""``benchmarks/data.py`` at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memorizing_transformers.data import train_bpe

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import data as bench

    return bench


@pytest.fixture
def contestants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import data_contestants

    return data_contestants


def test_texts_are_of_the_size_asked_for(bench, tmp_path: Path) -> None:
    bench.write(tmp_path / "corpus", bench.made(), 3, 30_000)
    parts = [path.read_text().splitlines() for path in sorted((tmp_path / "corpus").iterdir())]
    sizes = [sum(len(json.loads(line)["text"]) for line in part) for part in parts]
    assert sizes == [10_000] * 3
    assert next(bench.made()) == next(bench.made())


def test_given_texts_begin_again(bench, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [*islice(bench.given_texts(file), 5)] == ["one", "two", "one", "two", "one"]


def test_contestants_give_the_same_tokens(bench, contestants, tmp_path: Path) -> None:
    bench.write(tmp_path / "corpus", bench.made(), 2, 40_000)
    train_bpe(bench.up_to(bench.made(), 20_000), 400).save_pretrained(tmp_path / "tokenizer")
    given: dict[str, Any] = {"source": str(tmp_path / "corpus"), "processes": 1, "batch": 2,
                             "tokenizer": str(tmp_path / "tokenizer"), "parity": True,
                             "imported": True}  # fmt: skip
    found = {
        name: contestants.CONTESTANTS[name]({**given, "out": str(tmp_path / name)})
        for name in ("prepare", "datasets.map")
    }
    assert found["prepare"]["hash"] == found["datasets.map"]["hash"]
    assert found["prepare"]["tokens"] == found["datasets.map"]["tokens"] > 1000
    assert found["prepare"]["seconds"] > 0 < found["datasets.map"]["map alone"]


def test_a_fingerprint_knows_where_documents_end(contestants) -> None:
    cut = [contestants.fingerprint(x) for x in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]])]
    assert {found["tokens"] for found in cut} == {3}
    assert len({found["hash"] for found in cut}) == 3


def test_a_plan_of_pg19s_size_takes_less_than_a_second(contestants) -> None:
    asked = {"documents": 28_000, "tokens": 3_000_000_000, "rows": 64, "segment": 512}
    found = contestants.plan(asked)
    assert found["tokens"] == pytest.approx(3e9, rel=1e-3)
    assert found["seconds"] < 1 > found["evaluation"]


@pytest.mark.slow  # a minute: every measurement is a process of its own
def test_the_command_measures_everything(tmp_path: Path) -> None:
    given = {"megabytes": 0.2, "vocabulary": 300, "rounds": 1, "ram_rounds": 1, "files": 20}
    options = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, str(FOLDER / "data.py"), *options, "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    facts = json.loads((tmp_path / "data.json").read_text())
    speed = {row["from text to tokens"]: row["tokens/s"] for row in facts["speed"]}
    name = "datatrove" if find_spec("datatrove") else "datatrove: not installed"
    assert list(speed) == ["prepare", "datasets.map", "datasets.map alone", name]
    assert [row["text"] for row in facts["ram"]] == ["1 x 0.2 MB", "10 x 0.2 MB"]
    assert len(facts["again"]) == 3
    assert "not installed" in name or speed[name] > 0
    assert (tmp_path / "data.md").read_text().count("|---|") > 3
