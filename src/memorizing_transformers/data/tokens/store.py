"""The token store: a corpus as tokens on disk, memory-mapped.

A store is a folder::

    manifest.json        format, dtype, counts, and the exact size of every file
    tokenizer/           what `AutoTokenizer.from_pretrained` reads
    train.tokens.bin     all documents' tokens, one after the other
    train.offsets.npy    (D + 1,) int64, where each document begins
    train.bytes.npy      (D,) int64, UTF-8 bytes of each document
    train.names.json     the documents' names
    …                    the same for validation and test
    CACHEDIR.TAG         says to backups, and to our own reading of folders, that this is a cache

D documents of a split.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

FORMAT = 1
"""Raise it whenever the files or the way from text to tokens change."""
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
CACHE_TAG = "CACHEDIR.TAG"
"""A folder that holds this file can be made again (https://bford.info/cachedir/)."""
CACHE_TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# This folder holds tokenised text, written by memorizing_transformers. It can be deleted.
"""
MIN_TOKENS = 2
"""A document of one token has nothing to predict."""


class TokenStore:
    """The documents of one split, as tokens.

    Args:
        folder: a complete store.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        FileNotFoundError: the store has no such split.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(self.folder)
        if manifest is None or split not in manifest["splits"]:
            raise FileNotFoundError(f"{self.folder} is not a complete token store with {split}")
        self.vocab_size: int = manifest["vocab_size"]
        self.tokens: np.memmap[Any, np.dtype[Any]] = np.memmap(
            self.folder / f"{split}.tokens.bin", dtype=manifest["dtype"], mode="r"
        )
        """All documents' tokens, one after the other; uint16 or uint32."""
        self.offsets: NDArray[np.int64] = np.load(self.folder / f"{split}.offsets.npy")
        """(D + 1,) where each document begins, and the end of the last."""
        self.num_bytes: NDArray[np.int64] = np.load(self.folder / f"{split}.bytes.npy")
        """(D,) UTF-8 bytes of each document."""

    def __len__(self) -> int:
        return len(self.num_bytes)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, str]]:
        # Another process maps the files again instead of receiving the tokens.
        return TokenStore, (self.folder, self.split)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, {self.split!r}): {len(self)} documents"

    def document(self, index: int) -> NDArray[Any]:
        """A document's tokens, (L,) uint16 or uint32, mapped from disk.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, start: int, stop: int) -> NDArray[Any]:
        """A document's tokens from ``start`` up to ``stop`` or its end."""
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[min(begin + start, end) : min(begin + stop, end)]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(D,) tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def names(self) -> list[str]:
        """The documents' names."""
        return json.loads((self.folder / f"{self.split}.names.json").read_text("utf-8"))


class SplitWriter:
    """Writes one split's files into a folder, document by document; a context manager.

    Args:
        folder: exists already.
        split: the split's name.
        dtype: of the tokens on disk.
        min_tokens: documents of fewer tokens are left out.
    """

    def __init__(
        self, folder: Path, split: str, dtype: DTypeLike, min_tokens: int = MIN_TOKENS
    ) -> None:
        self.folder = folder
        self.split = split
        self.dtype = np.dtype(dtype)
        self.offsets = array("q", [0])
        self.num_bytes = array("q")
        self.names: list[str] = []
        self.min_tokens = min_tokens
        self.left_out = 0
        """Documents left out for any reason."""
        self.too_few_tokens = 0
        """Those of them that had fewer than `min_tokens`."""
        self._stream = open(folder / f"{split}.tokens.bin", "wb")  # noqa: SIM115

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._stream.close()

    def add(self, name: str, tokens: NDArray[np.uint32], num_bytes: int) -> None:
        """Append a document; one of fewer than `min_tokens` is left out and counted."""
        if len(tokens) < self.min_tokens:
            self.left_out += 1
            self.too_few_tokens += 1
            return
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.num_bytes.append(num_bytes)
        self.names.append(name)

    def counts(self) -> dict[str, int]:
        """Documents, tokens and bytes written, and documents left out."""
        return {
            "documents": len(self.names),
            "tokens": self.offsets[-1],
            "bytes": sum(self.num_bytes),
            "left_out": self.left_out,
        }

    def _finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        np.save(self.folder / f"{self.split}.offsets.npy", np.asarray(self.offsets, np.int64))
        np.save(self.folder / f"{self.split}.bytes.npy", np.asarray(self.num_bytes, np.int64))
        names = json.dumps(self.names, ensure_ascii=True)
        (self.folder / f"{self.split}.names.json").write_text(names, "utf-8")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder whose other files are complete."""
    files = {name: size for name, size in _sizes(folder) if name not in (MANIFEST, CACHE_TAG)}
    (folder / CACHE_TAG).write_text(CACHE_TAG_TEXT, "utf-8")
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store, None unless the store is there, of this format and complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    present = dict(_sizes(folder))
    complete = all(present.get(name) == size for name, size in manifest["files"].items())
    return manifest if complete else None


def _sizes(folder: Path) -> Iterable[tuple[str, int]]:
    for file in folder.rglob("*"):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file.stat().st_size
