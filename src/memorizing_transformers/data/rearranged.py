"""Stores whose documents are made of another store's tokens: controls for what memory is worth.

Both hold the same tokens as the store beneath, in other documents. Nothing is copied or cached.

Shapes: D documents.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .store import MIN_TOKENS, TokenStore


class CutStore(TokenStore):
    """Documents of ordinary length: each is cut into pieces, every piece a document of its own.

    Args:
        store: the documents.
        tokens: the longest piece. A last piece of one token is left out: nothing predicts it.
    """

    def __init__(self, store: TokenStore, tokens: int) -> None:
        self._adopt(store)
        self._cut = tokens
        starts, owners = [], []
        for owner, (begin, end) in enumerate(zip(store.offsets, store.offsets[1:], strict=False)):
            own = np.arange(begin, end - MIN_TOKENS + 1, tokens)
            starts.append(own)
            owners.append(np.full(len(own), owner))
        self._starts: NDArray[np.int64] = np.concatenate(starts)
        self._owners: NDArray[np.int64] = np.concatenate(owners)
        ends = np.minimum(self._starts + tokens, store.offsets[self._owners + 1])
        self.lengths = ends - self._starts
        share = self.lengths / store.lengths[self._owners]
        self.num_bytes = np.rint(store.num_bytes[self._owners] * share).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return CutStore, (TokenStore(self.folder, self.split), self._cut)

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
    """Documents out of order: whole blocks change places among all documents of the split.

    A document keeps its name, its length and its last, partial block. What a row's memory holds is
    thus text from anywhere. The token behind a block's end is foreign, so of every block one
    prediction is another than without.

    Args:
        store: the documents.
        tokens: of a block.
        seed: of the order.
    """

    def __init__(self, store: TokenStore, tokens: int, seed: int = 0) -> None:
        self._adopt(store)
        self._block, self._seed = tokens, seed
        whole = store.lengths // tokens
        self._first = np.concatenate([[0], np.cumsum(whole)])
        starts = [
            np.arange(count) * tokens + begin
            for count, begin in zip(whole, store.offsets, strict=False)
        ]
        blocks = np.concatenate(starts).astype(np.int64)
        # Raw bits and a stable sort: NumPy promises to keep these, unlike `permutation`.
        bits = np.random.PCG64(np.random.SeedSequence((seed, tokens))).random_raw(len(blocks))
        self._blocks: NDArray[np.int64] = blocks[np.argsort(bits, kind="stable")]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShuffledStore, (TokenStore(self.folder, self.split), self._block, self._seed)

    def read(self, index: int, start: int, stop: int) -> NDArray[Any]:
        """Some tokens of a document of blocks from anywhere."""
        stop = min(stop, int(self.lengths[index]))
        first, last = int(self._first[index]), int(self._first[index + 1])
        parts = []
        for block in range(start // self._block, -(-stop // self._block)):
            own = first + block < last
            begin = self._blocks[first + block] if own else self._tail(index)
            left = block * self._block
            low, high = max(start, left), min(stop, left + self._block)
            parts.append(self.tokens[begin + low - left : begin + high - left])
        return np.concatenate(parts) if parts else self.tokens[:0]

    def _tail(self, index: int) -> int:
        return int(self.offsets[index] + self.lengths[index] // self._block * self._block)
