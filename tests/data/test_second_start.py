"""A second start on an unchanged corpus costs the same whatever its size: nothing is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers.data.tokens import known_stores, prepare
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, train_bpe

SECOND_START = """
import sys
from pathlib import Path
from memorizing_transformers.data import (
    CorpusSettings, SourceSettings, TokenizerSettings, TokenStore, prepare_store,
)
source, tokenizer, cache = sys.argv[1:]
settings = CorpusSettings(SourceSettings(source), TokenizerSettings(tokenizer))
TokenStore(prepare_store(settings, Path(cache)), "train")
print(*{"torch", "transformers", "datasets"} & sys.modules.keys())
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    train_bpe(["word word1 word2 "] * 10, 260).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bytes", "bpe", "folder"])
def test_a_second_start_imports_no_large_library(corpus, texts, tmp_path, tokenizer, kind) -> None:
    name = str(tokenizer) if kind == "folder" else kind
    cache = tmp_path / "cache"
    prepare_store(corpus(texts, tokenizer=name), cache)
    command = [sys.executable, "-c", SECOND_START, str(texts), name, str(cache)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""


def test_a_tokenizer_of_a_folder_is_not_loaded_again(
    corpus, texts, tmp_path, tokenizer, monkeypatch
) -> None:
    settings = corpus(texts, tokenizer=str(tokenizer))
    folder = prepare_store(settings, tmp_path / "cache")

    def load(name: str) -> None:
        raise AssertionError("the tokenizer is loaded")

    monkeypatch.setattr(prepare, "load_tokenizer", load)
    assert prepare_store(settings, tmp_path / "cache") == folder


def test_another_tokenizer_in_the_folder_is_noticed(corpus, texts, tmp_path, tokenizer) -> None:
    settings = corpus(texts, tokenizer=str(tokenizer))
    folder = prepare_store(settings, tmp_path / "cache")
    byte_tokenizer().save_pretrained(tokenizer)
    other = prepare_store(settings, tmp_path / "cache")
    assert other != folder
    assert other == prepare_store(corpus(texts, tokenizer="bytes"), tmp_path / "cache")


def test_a_tokenizer_of_the_hub_is_loaded_to_see_whether_it_changed(
    corpus, texts, tmp_path, monkeypatch
) -> None:
    """Its name stays the same when its files change."""
    kinds = {"small": train_bpe(["word word1 "] * 10, 260), "bytes": byte_tokenizer()}
    settings = corpus(texts, tokenizer="owner/name")
    folders = []
    for kind in ("small", "bytes", "small"):
        monkeypatch.setattr(prepare, "load_tokenizer", lambda name, kind=kind: kinds[kind])
        folders.append(prepare_store(settings, tmp_path / "cache"))
    assert folders[0] == folders[2] != folders[1]


def test_each_file_is_looked_at_three_times(corpus, tmp_path, monkeypatch) -> None:
    """Once to see that it is a file, once for its other names, once for its times."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(500):
        (many / f"{number}.txt").write_text(f"text {number}")
        os.utime(many / f"{number}.txt", (1, 1))
    settings = corpus(many)
    folder = prepare_store(settings, tmp_path / "cache")
    monkeypatch.setattr(known_stores, "YOUNG_NS", 0)
    assert prepare_store(settings, tmp_path / "cache") == folder
    stat, looks = os.stat, 0

    def counted(*args: Any, **options: Any) -> os.stat_result:
        nonlocal looks
        looks += 1
        return stat(*args, **options)

    monkeypatch.setattr(os, "stat", counted)
    assert prepare_store(settings, tmp_path / "cache") == folder
    assert looks <= 3 * 500 + 100
