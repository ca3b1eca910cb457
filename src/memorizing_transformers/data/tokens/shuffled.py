"""The tokens of a store in other documents: controls for what memory is worth.

Both read the files of an ordinary store and write nothing.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..row_plan import drawn_order
from .store import MIN_TOKENS, TokenStore


class CutStore(TokenStore):
    """Documents of ordinary length: each is cut into pieces, every piece a document of its own.

    Args:
        folder: a complete store.
        split: its split.
        tokens: the longest piece. A last piece of one token is left out: nothing predicts it.
    """

    def __init__(self, folder: Path, split: str, tokens: int) -> None:
        super().__init__(folder, split)
        self._cut = tokens
        whole = np.diff(self.offsets)
        pieces = (whole - MIN_TOKENS) // tokens + 1
        self._owners = np.repeat(np.arange(len(whole)), pieces)
        place = np.arange(len(self._owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts: NDArray[np.int64] = self.offsets[self._owners] + place * tokens
        ends = np.minimum(self._starts + tokens, self.offsets[self._owners + 1])
        self.lengths = ends - self._starts
        share = self.lengths / whole[self._owners]
        self.num_bytes = np.rint(self.num_bytes[self._owners] * share).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return CutStore, (self.folder, self.split, self._cut)

    def read(self, index: int, start: int, stop: int) -> NDArray[Any]:
        """Some tokens of a piece."""
        begin, length = int(self._starts[index]), int(self.lengths[index])
        return self.tokens[begin + min(start, length) : begin + min(stop, length)]

    @cached_property
    def names(self) -> list[str]:
        """The documents' names, each with the piece's first token."""
        names = TokenStore(self.folder, self.split).names
        first = self._starts - self.offsets[self._owners]
        return [f"{names[o]} from {f}" for o, f in zip(self._owners, first, strict=True)]


class ShuffledStore(TokenStore):
    """Documents out of order: blocks are exchanged between all documents of the split.

    A document keeps its name, its length and its last, partial block. What a row's memory holds is
    thus text from anywhere. The token behind a block's end is foreign, so of every block one
    prediction is another than without.

    Args:
        folder: a complete store.
        split: its split.
        tokens: of a block.
    """

    def __init__(self, folder: Path, split: str, tokens: int) -> None:
        super().__init__(folder, split)
        self._block = tokens
        whole = self.lengths // tokens
        self._first = np.concatenate([[0], np.cumsum(whole)])
        place = np.arange(self._first[-1]) - np.repeat(self._first[:-1], whole)
        blocks = np.repeat(self.offsets[:-1], whole) + place * tokens
        self._blocks: NDArray[np.int64] = blocks[drawn_order(len(blocks), (tokens,))]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShuffledStore, (self.folder, self.split, self._block)

    def read(self, index: int, start: int, stop: int) -> NDArray[Any]:
        """Some tokens of a document of blocks from anywhere."""
        stop = min(stop, int(self.lengths[index]))
        first, last = int(self._first[index]), int(self._first[index + 1])
        parts = []
        for block in range(start // self._block, -(-stop // self._block)):
            own = first + block < last
            left = block * self._block
            begin = self._blocks[first + block] if own else int(self.offsets[index]) + left
            low, high = max(start, left), min(stop, left + self._block)
            parts.append(self.tokens[begin + low - left : begin + high - left])
        return np.concatenate(parts) if parts else self.tokens[:0]


def open_store(
    folder: Path, split: str, cut_tokens: int | None, shuffle_tokens: int | None
) -> TokenStore:
    """The documents of a split, as they are or changed.

    Args:
        folder: of the store.
        split: train, validation or test.
        cut_tokens: tokens of the documents that each one is cut into; None for whole ones.
        shuffle_tokens: tokens of the blocks that documents exchange; None for none.
    """
    if cut_tokens is not None:
        return CutStore(folder, split, cut_tokens)
    if shuffle_tokens is not None:
        return ShuffledStore(folder, split, shuffle_tokens)
    return TokenStore(folder, split)
