"""The token store: what is written is what is read, and only a complete store is opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from memorizing_transformers.data.tokens.store import (
    SplitWriter,
    TokenStore,
    read_manifest,
    token_dtype,
    write_manifest,
)


def test_documents_come_back(make_store) -> None:
    store = make_store([5, 2, 9])
    assert len(store) == 3
    assert store.lengths.tolist() == [5, 2, 9]
    assert store.num_bytes.tolist() == [15, 6, 27]
    assert store.names == ["document 0", "document 1", "document 2"]
    assert store.document(2).tolist() == list(range(2000, 2009))
    assert store.document(2).dtype == np.uint16
    assert isinstance(store.document(0), np.memmap)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.document(index)


def test_documents_of_one_token_are_left_out_and_counted(make_store) -> None:
    store = make_store([1, 4, 0, 2])
    assert store.lengths.tolist() == [4, 2]
    assert store.names == ["document 1", "document 3"]


def test_counts(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "test", np.uint32) as writer:
        writer.add("long", np.arange(70_000, dtype=np.uint32), 99)
        writer.add("short", np.arange(1, dtype=np.uint32), 1)
    assert writer.counts() == {"documents": 1, "tokens": 70_000, "bytes": 99, "left_out": 1}
    write_manifest(tmp_path, {"vocab_size": 70_000, "dtype": "uint32", "splits": {"test": {}}})
    assert TokenStore(tmp_path, "test").document(0)[-1] == 69_999


def test_the_dtype_holds_every_token() -> None:
    assert token_dtype(256) == token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_another_process_maps_the_files_anew(make_store) -> None:
    store = make_store([500])
    pickled = pickle.dumps(store)
    assert len(pickled) < 400
    assert pickle.loads(pickled).document(0).tolist() == store.document(0).tolist()


@pytest.mark.parametrize("damage", ["cut", "missing", "format", "no manifest", "manifest cut"])
def test_a_damaged_store_is_not_opened(make_store, damage: str) -> None:
    folder = make_store([5, 5]).folder
    manifest = folder / "manifest.json"
    if damage == "cut":
        (folder / "train.tokens.bin").write_bytes(b"\0\0")
    elif damage == "missing":
        (folder / "train.offsets.npy").unlink()
    elif damage == "format":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    assert read_manifest(folder) is None
    with pytest.raises(FileNotFoundError, match="not a complete token store"):
        TokenStore(folder, "train")


def test_a_split_that_is_not_there_is_refused(make_store) -> None:
    with pytest.raises(FileNotFoundError, match="validation"):
        TokenStore(make_store([5]).folder, "validation")
