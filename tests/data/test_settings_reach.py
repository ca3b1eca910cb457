"""Every key of the data settings reaches what it is said to set, and nothing else."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.tokens import prepare

ORDER, HELD_ORDER = "training batches", "held-out batches"
TRAIN, HELD, FOLDER, PREDICTED = "training documents", "held-out documents", "folder", "predicted"
WORKERS = "threads"
EVERYTHING = {ORDER, HELD_ORDER, TRAIN, HELD, FOLDER, PREDICTED}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of texts, and records."""
    for index in range(24):
        file = tmp_path / "texts" / f"part{index // 2}" / f"text{index:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(f"word{index * 31 + n}" for n in range(6 + 9 * index)))
    rows = [{"id": n, "text": f"text {n} " * 30, "body": f"body {n} " * 30} for n in range(20)]
    for n, row in enumerate(rows):
        row |= {"part": n // 2, "place": -n, "kind": n % 2}
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.txt").write_text("held out " * 40)
    return tmp_path


def facts(root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """What a data module gives, by aspect."""
    settings = {"source": "texts", "batch_rows": 4, "segment_length": 32, "cache_dir": "cache"}
    settings |= {"validation_fraction": 0.2, "test_fraction": 0.2, "num_workers": 1, **options}
    monkeypatch.chdir(root)
    shutil.rmtree("cache", ignore_errors=True)
    workers: list[int] = []
    encode_in_order = prepare.encode_in_order

    def spy(encode, documents, num_workers, *more):
        workers.append(num_workers)
        return encode_in_order(encode, documents, num_workers, *more)

    monkeypatch.setattr(prepare, "encode_in_order", spy)
    data = DocumentDataModule(**settings)
    data.prepare_data()
    data.setup("fit")
    stores = {split: getattr(data, f"{split}_store") for split in ("train", "validation", "test")}

    def content(split: str) -> list[Any]:
        store = stores[split]
        documents = [store.document(n).tolist() for n in range(len(store))]
        return [store.names, documents]

    def batches(loader: Any) -> list[Any]:
        return [[field.tolist() for field in batch] for batch in loader]

    training = data.train_dataloader()
    return {
        FOLDER: data.store_folder,
        TRAIN: content("train"),
        HELD: [content("validation"), content("test")],
        ORDER: batches(training.batch(0, step) for step in range(6)),
        HELD_ORDER: [batches(data.val_dataloader()), batches(data.test_dataloader())],
        PREDICTED: batches(data.predict_dataloader()),
        WORKERS: {*workers},
    }


BPE = {"tokenizer": "bpe", "bpe_vocab_size": 300}
REACH: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "source": ({}, "r.jsonl", EVERYTHING),
    "validation_source": ({}, "own.txt", EVERYTHING - {PREDICTED}),
    "test_source": ({}, "own.txt", EVERYTHING),
    "text_column": ({"source": "r.jsonl"}, "body", EVERYTHING),
    "group_column": ({"source": "r.jsonl"}, "part", EVERYTHING),
    "sort_column": ({"source": "r.jsonl", "group_column": "part"}, "place", EVERYTHING),
    "where": ({"source": "r.jsonl"}, {"kind": 1}, EVERYTHING),
    "group": ({}, "folder", EVERYTHING),
    "validation_fraction": ({}, 0.4, EVERYTHING - {PREDICTED}),
    "test_fraction": ({}, 0.4, EVERYTHING),
    "min_characters": ({}, 500, EVERYTHING),
    "min_tokens": ({}, 500, EVERYTHING),
    "tokenizer": ({}, "bpe", EVERYTHING),
    "bpe_vocab_size": (BPE, 320, EVERYTHING),
    "bpe_train_bytes": (BPE, 300, EVERYTHING),
    "batch_rows": ({"eval_rows": 4}, 3, {ORDER}),
    "eval_rows": ({}, 3, {HELD_ORDER, PREDICTED}),
    "segment_length": ({}, 16, {ORDER, HELD_ORDER, PREDICTED}),
    "seed": ({}, 1, {ORDER}),
    "cut_tokens": ({}, 50, EVERYTHING - {FOLDER}),
    "shuffle_tokens": ({}, 16, EVERYTHING - {FOLDER}),
    "cache_dir": ({}, "elsewhere", {FOLDER}),
    "num_workers": ({}, 2, {WORKERS}),
    "predict_split": ({}, "validation", {PREDICTED}),
}
"""By key: what else is set, another value than the usual, and what it changes."""


def test_no_key_is_forgotten() -> None:
    assert set(REACH) == {*inspect.signature(DocumentDataModule).parameters}


@pytest.mark.parametrize("key", REACH)
def test_a_key_changes_what_it_sets_and_nothing_else(root: Path, key: str, monkeypatch) -> None:
    others, value, changed = REACH[key]
    before = facts(root, monkeypatch, **others)
    assert facts(root, monkeypatch, **others) == before
    after = facts(root, monkeypatch, **{**others, key: value})
    assert {aspect for aspect in before if before[aspect] != after[aspect]} == changed


def test_training_batches_follow_the_seed(root: Path, monkeypatch) -> None:
    orders = [facts(root, monkeypatch, seed=seed)[ORDER][0] for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
