"""Small corpora for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memorizing_transformers.data.settings import CorpusSettings, SourceSettings, TokenizerSettings
from memorizing_transformers.data.tokens.store import SplitWriter, TokenStore, write_manifest

MakeStore = Callable[[list[int]], TokenStore]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve text files of 50 to 930 characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(12):
        words = " ".join(f"word{index * 31 + n}" for n in range(6 + 10 * index))
        (folder / f"text{index:02d}.txt").write_text(words, "utf-8")
    return folder


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Writes a training split of given lengths; token p of document d is ``1000 * d + p``."""

    def make(lengths: list[int]) -> TokenStore:
        folder = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with SplitWriter(folder, "train", np.uint16) as writer:
            for document, length in enumerate(lengths):
                tokens = np.arange(length, dtype=np.uint32) + 1000 * document
                writer.add(f"document {document}", tokens, num_bytes=3 * length)
        facts = {"vocab_size": 60_000, "dtype": "uint16", "splits": {"train": {}}}
        write_manifest(folder, facts)
        return TokenStore(folder, "train")

    return make


@pytest.fixture
def corpus() -> Callable[..., CorpusSettings]:
    """Makes a corpus's settings from one flat set of options."""

    def settings(source: Path | str, **options: Any) -> CorpusSettings:
        names = {field.name for field in fields(TokenizerSettings)}
        tokenizer = {name: options.pop(name) for name in names & options.keys()}
        names = {"min_characters", "min_tokens"}
        least = {name: options.pop(name) for name in names & options.keys()}
        sources = SourceSettings(str(source), **options)
        return CorpusSettings(sources, TokenizerSettings(**tokenizer), **least)

    return settings
