"""Preparing a store: once, whole or not at all, and the same whoever does it."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from memorizing_transformers.data.tokens import prepare
from memorizing_transformers.data.tokens.prepare import prepare_store, summary_lines
from memorizing_transformers.data.tokens.store import SplitWriter, TokenStore, read_manifest
from memorizing_transformers.errors import ConfigError, UserError

SPLITS = ("train", "validation", "test")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that were encoded since the test began."""
    texts: list[str] = []
    make_encoder = prepare.make_encoder

    def spying(tokenizer):
        encode = make_encoder(tokenizer)
        return lambda text: (texts.append(text), encode(text))[1]

    monkeypatch.setattr(prepare, "make_encoder", spying)
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_a_store_holds_every_text(corpus, texts: Path, cache: Path) -> None:
    folder = prepare_store(corpus(texts), cache)
    assert folder.parent == cache
    found = {}
    for split in SPLITS:
        store = TokenStore(folder, split)
        assert store.vocab_size == 256
        for index, name in enumerate(store.names):
            found[name] = bytes(store.document(index).astype(np.uint8)).decode()
            assert store.num_bytes[index] == len(store.document(index))
    assert found == {file.name: file.read_text() for file in texts.iterdir()}
    lines = summary_lines(folder)
    assert lines[0].startswith("tokenizer bytes: 256 tokens")
    assert [line.split(":")[0] for line in lines[1:]] == list(SPLITS)


def test_the_tokenizer_stands_beside_the_tokens(corpus, texts: Path, cache: Path) -> None:
    settings = corpus(texts, tokenizer="bpe", bpe_vocab_size=300)
    folder = prepare_store(settings, cache)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    store = TokenStore(folder, "train")
    for index, name in enumerate(store.names):
        text = (texts / name).read_text()
        assert store.document(index).tolist() == tokenizer.encode(text)
        assert store.num_bytes[index] == len(text)

    again = prepare_store(corpus(texts, tokenizer=str(folder / "tokenizer")), cache)
    assert contents(again)["train.tokens.bin"] == contents(folder)["train.tokens.bin"]


def test_a_bpe_learns_from_training_documents_only(corpus, tmp_path: Path, cache: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "held out.txt"
    train.write_text("abab " * 50)
    held_out.write_text("zqzq " * 50)
    settings = corpus(
        train,
        validation_source=str(held_out),
        test_source=str(held_out),
        tokenizer="bpe",
        bpe_vocab_size=280,
    )
    folder = prepare_store(settings, cache)
    vocabulary = AutoTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    assert "ab" in vocabulary
    assert not any("zq" in token for token in vocabulary)


def test_a_bpe_learns_nothing_of_documents_cut_off(corpus, texts: Path, cache: Path) -> None:
    folder = prepare_store(corpus(texts), cache)
    for split in ("validation", "test"):
        for name in TokenStore(folder, split).names:
            (texts / name).write_text("zqzq " * 500)
    folder = prepare_store(corpus(texts, tokenizer="bpe", bpe_vocab_size=300), cache)
    vocabulary = AutoTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    assert "word" in vocabulary
    assert not any("zq" in token for token in vocabulary)


def test_a_second_time_nothing_is_encoded(corpus, texts: Path, cache: Path, encoded) -> None:
    settings = corpus(texts, tokenizer="bpe", bpe_vocab_size=260)
    folder = prepare_store(settings, cache)
    assert len(encoded) == 12
    assert prepare_store(settings, cache) == folder
    assert len(encoded) == 12


def test_whatever_changes_the_tokens_changes_the_folder(corpus, texts: Path, cache: Path) -> None:
    seen = {prepare_store(corpus(texts), cache)}
    for options in (
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "bpe_vocab_size": 300},
        {"tokenizer": "bpe", "bpe_train_bytes": 100},
        {"min_characters": 60},
        {"validation_fraction": 0.3},
    ):
        folder = prepare_store(corpus(texts, **options), cache)
        assert folder not in seen
        seen.add(folder)
    (texts / "text01.txt").write_text("another text")
    assert prepare_store(corpus(texts), cache) not in seen


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same(corpus, texts, tmp_path, workers: int) -> None:
    settings = corpus(texts, tokenizer="bpe", bpe_vocab_size=300)
    alone = prepare_store(settings, tmp_path / "one", num_workers=1)
    together = prepare_store(settings, tmp_path / "many", num_workers=workers)
    assert alone.name == together.name
    assert contents(alone) == contents(together)


@pytest.mark.parametrize("moment", ["document", "tokenizer", "manifest"])
def test_a_crash_leaves_nothing_behind(corpus, texts, cache, monkeypatch, moment: str) -> None:
    def crash(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "document":
            patch.setattr(SplitWriter, "add", crash)
        elif moment == "tokenizer":
            patch.setattr(prepare, "vocabulary_size", crash)
        else:
            patch.setattr(prepare, "write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare_store(corpus(texts), cache)
    assert folders(cache) == []
    assert read_manifest(prepare_store(corpus(texts), cache)) is not None


def test_what_a_killed_run_left_is_removed(corpus, texts: Path, cache: Path) -> None:
    folder = prepare_store(corpus(texts), cache)
    whole = contents(folder)
    # As after a kill: a half-written folder, of this store and of another one.
    for name in (folder.name, "0123456789abcdef"):
        (cache / f"{name}.tmp-dead").mkdir()
        (cache / f"{name}.tmp-dead" / "train.tokens.bin").write_bytes(b"half")
    shutil.rmtree(folder)
    assert contents(prepare_store(corpus(texts), cache)) == whole
    assert folders(cache) == [folder.name]


def test_what_a_living_run_writes_is_left_alone(corpus, texts: Path, cache: Path) -> None:
    from filelock import FileLock

    living = cache / "0123456789abcdef.tmp-living"
    living.mkdir(parents=True)
    with FileLock(cache / "0123456789abcdef.lock"):
        prepare_store(corpus(texts), cache)
        assert living.is_dir()


def test_a_damaged_store_is_made_anew(corpus, texts: Path, cache: Path) -> None:
    folder = prepare_store(corpus(texts), cache)
    whole = contents(folder)
    (folder / "train.tokens.bin").write_bytes(b"cut")
    assert prepare_store(corpus(texts), cache) == folder
    assert contents(folder) == whole


def test_two_at_a_time_do_the_work_once(corpus, texts: Path, cache: Path, encoded) -> None:
    settings = corpus(texts, tokenizer="bpe", bpe_vocab_size=300)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: prepare_store(settings, cache, 1), range(3)))
    assert len(set(results)) == 1
    assert len(encoded) == 12
    assert folders(cache) == [results[0].name]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("No space (os error 28)")],
)
def test_a_full_disk_is_told_and_nothing_is_left(corpus, texts, cache, monkeypatch, error) -> None:
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(SplitWriter, "add", full)
    with pytest.raises(ConfigError, match=r"^data\.cache_dir = .*the disk is full"):
        prepare_store(corpus(texts), cache)
    assert folders(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_told(corpus, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"^data\.cache_dir = .*cannot be written"):
        prepare_store(corpus(texts), tmp_path / "file" / "cache")


def test_short_documents_are_left_out_and_counted(corpus, texts: Path, cache: Path) -> None:
    (texts / "empty.txt").write_text("")
    (texts / "letter.txt").write_text("x")
    folder = prepare_store(corpus(texts), cache)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(manifest["splits"][split]["left_out"] for split in SPLITS) == 2
    assert sum(manifest["splits"][split]["documents"] for split in SPLITS) == 12
    assert any("left out as too short" in line for line in summary_lines(folder))

    folder = prepare_store(corpus(texts, min_characters=300), cache)
    for split in SPLITS:
        assert TokenStore(folder, split).num_bytes.min() >= 300


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_with_nothing_left_is_told(corpus, tmp_path, cache, split: str) -> None:
    (tmp_path / "long.txt").write_text("a long text")
    (tmp_path / "short.txt").write_text("x")
    sources = {"train": tmp_path / "long.txt", "validation": tmp_path / "long.txt"}
    sources[split] = tmp_path / "short.txt"
    settings = corpus(
        sources["train"], validation_source=str(sources["validation"]), test_fraction=0
    )
    key = "data.source" if split == "train" else "data.validation_source"
    with pytest.raises(UserError, match=rf"^{key} = .*short\.txt.*no document left for {split}"):
        prepare_store(settings, cache)
    assert folders(cache) == []


def test_replaced_bytes_are_reported_once(corpus, texts: Path, cache: Path, caplog) -> None:
    for index in range(3):
        (texts / f"latin{index}.txt").write_bytes(b"gr\xfc\xdfe " * 20)
    prepare_store(corpus(texts, tokenizer="bpe"), cache)
    told = [record.message for record in caplog.records if "U+FFFD" in record.message]
    assert len(told) == 1
    assert "in 3 files" in told[0]


def test_json_lines_with_their_own_splits(corpus, tmp_path: Path, cache: Path) -> None:
    for split in SPLITS:
        lines = [json.dumps({"title": f"{split} {n}", "text": f"{split} ü {n}"}) for n in range(3)]
        archive = gzip.compress("\n".join(lines).encode())
        (tmp_path / f"books.{split}.jsonl.gz").write_bytes(archive)
    settings = corpus(
        tmp_path / "books.train.jsonl.gz",
        validation_source=str(tmp_path / "books.validation.jsonl.gz"),
        test_source=str(tmp_path / "books.test.jsonl.gz"),
    )
    folder = prepare_store(settings, cache)
    for split in SPLITS:
        store = TokenStore(folder, split)
        assert store.names == [f"{split} {n}" for n in range(3)]
        assert bytes(store.document(1).astype(np.uint8)).decode() == f"{split} ü 1"
