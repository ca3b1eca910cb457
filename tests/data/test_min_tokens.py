"""data.min_tokens: shorter documents are left out, counted and told once; the store knows it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from memorizing_transformers.data.settings import SPLITS
from memorizing_transformers.data.sources.splits import fingerprint_sources, open_sources
from memorizing_transformers.data.tokens.prepare import prepare_store, summary_lines
from memorizing_transformers.data.tokens.store import FORMAT, TokenStore
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, fingerprint_tokenizer
from memorizing_transformers.errors import ConfigError, UserError


def lengths(folder: Path) -> list[int]:
    return [length for split in SPLITS for length in TokenStore(folder, split).lengths.tolist()]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shorter_documents_are_left_out(corpus, texts: Path, tmp_path: Path, tokenizer) -> None:
    every = lengths(prepare_store(corpus(texts, tokenizer=tokenizer), tmp_path))
    least = sorted(every)[4]
    folder = prepare_store(corpus(texts, tokenizer=tokenizer, min_tokens=least), tmp_path)
    assert sorted(lengths(folder)) == sorted(every)[4:]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(manifest["splits"][split]["left_out"] for split in SPLITS) == 4
    assert any("left out as too short" in line for line in summary_lines(folder))


def test_they_are_counted_in_one_line(corpus, texts: Path, tmp_path: Path, caplog) -> None:
    (texts / "letter.txt").write_text("x")
    prepare_store(corpus(texts, min_tokens=300, min_characters=100), tmp_path)
    told = [record.message for record in caplog.records if "min_tokens" in record.message]
    sizes = [len(file.read_text()) for file in texts.iterdir()]
    few = sum(100 <= size < 300 for size in sizes)
    kept = sum(size >= 300 for size in sizes)
    assert told == [f"data.min_tokens = 300: {few} documents of fewer tokens left out, {kept} kept"]


def test_nothing_is_told_unless_it_is_set(corpus, texts: Path, tmp_path: Path, caplog) -> None:
    (texts / "letter.txt").write_text("x")
    prepare_store(corpus(texts), tmp_path)
    prepare_store(corpus(texts, min_tokens=3, test_fraction=0.3), tmp_path / "other")
    assert len([r for r in caplog.records if "min_tokens" in r.message]) == 1


def test_it_makes_another_store_and_the_default_does_not(corpus, texts, tmp_path: Path) -> None:
    plain = prepare_store(corpus(texts), tmp_path)
    assert prepare_store(corpus(texts, min_tokens=2), tmp_path) == plain
    seen = {prepare_store(corpus(texts, min_tokens=least), tmp_path) for least in (3, 4)}
    assert len({plain, *seen}) == 3


def test_stores_that_were_made_before_keep_their_names(corpus, texts, tmp_path: Path) -> None:
    settings = corpus(texts)
    facts = [
        FORMAT,
        fingerprint_tokenizer(byte_tokenizer()),
        settings.shortest,
        fingerprint_sources(open_sources(settings.sources)),
    ]
    name = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    assert prepare_store(settings, tmp_path).name == name


def test_the_other_documents_stay_in_their_splits(corpus, texts: Path, tmp_path: Path) -> None:
    options = {"validation_fraction": 0.3, "test_fraction": 0.3}
    folders = [
        prepare_store(corpus(texts, min_tokens=least, **options), tmp_path) for least in (2, 200)
    ]
    for split in SPLITS:
        before, after = (TokenStore(folder, split) for folder in folders)
        kept = [name for name, size in zip(before.names, before.lengths, strict=True) if size > 199]
        assert after.names == kept


def test_a_split_with_nothing_left_is_told(corpus, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no document left for .*data\.min_tokens \(5000\)$"):
        prepare_store(corpus(texts, min_tokens=5000), tmp_path)


@pytest.mark.parametrize("least", [1, 0, -5])
def test_what_cannot_work_is_refused(corpus, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.min_tokens = {least}: must be at least 2"):
        corpus("texts", min_tokens=least)
