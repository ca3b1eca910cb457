"""A segment that is read in parts, as generation does: token by token, written when it is full.

Shapes: B rows, N segment, n of its tokens that were read, W cached tokens, G key/value heads,
D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bank import MemoryBank, Pairs, SegmentPairs
from .cache import XLCache
from .rows import RowStore


class OpenCache(RowStore):
    """What a token of an open segment sees before it in one layer: the XL cache, then the segment.

    Reads as an ``XLCache`` does; its pairs lie in one buffer, which ``append`` fills in place.

    Args:
        keys: (B, G, W, D) cached keys, as attention takes them.
        values: (B, G, W, D).
        valid: (B, W) bool, which of them count.
        room: tokens N of a full segment.
    """

    def __init__(self, keys: Tensor, values: Tensor, valid: Tensor, room: int) -> None:
        self.cached = keys.shape[2]
        self.size = self.cached
        """Pairs W + n."""
        self._valid = torch.cat([valid, valid.new_ones(valid.shape[0], room)], 1)
        self._keys, self._values = (
            torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, values)
        )

    @classmethod
    def after(cls, cache: XLCache | None, pairs: Pairs, room: int) -> OpenCache:
        """That of a segment that begins; ``pairs`` give shapes and dtypes where nothing is cached.

        Args:
            cache: the layer's XL cache, or None.
            pairs: of any tokens.
            room: tokens N of a full segment.
        """
        if cache is not None:
            return cls(cache.keys, cache.values, cache.valid(), room)
        keys, values = (x[:, :, :0].detach() for x in pairs)
        valid = torch.ones(keys.shape[0], 0, dtype=torch.bool, device=keys.device)
        return cls(keys, values, valid, room)

    @property
    def keys(self) -> Tensor:
        """(B, G, W + n, D)."""
        return self._keys[:, :, : self.size]

    @property
    def values(self) -> Tensor:
        """(B, G, W + n, D)."""
        return self._values[:, :, : self.size]

    def valid(self) -> Tensor:
        """(B, W + n) bool: which of the pairs count."""
        return self._valid[:, : self.size]

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the pairs (B, G, m, D) of the tokens that were read."""
        stop = self.size + keys.shape[2]
        self._keys[:, :, self.size : stop] = keys
        self._values[:, :, self.size : stop] = values
        self.size = stop

    def own(self) -> Pairs:
        """The segment's pairs, without the cached ones."""
        return self.keys[:, :, self.cached :], self.values[:, :, self.cached :]


class OpenSegment:
    """The tokens of a segment that is not complete, and the pairs of all layers.

    A network's forward pass reads on: it sees what was read and adds its own tokens.

    Args:
        bank: what was read before the segment; not changed.
        length: tokens N of a full segment.
    """

    def __init__(self, bank: MemoryBank, length: int) -> None:
        self.bank, self.length = bank, length
        self.input_ids = torch.zeros(bank.batch_size, 0, dtype=torch.int64)
        """(B, n)."""
        self.caches: dict[int, OpenCache] = {}
        """By layer; empty before the first token."""
        self.state: Any = None
        """What a network keeps from one part to the next; has a method ``take`` as this has."""

    @property
    def count(self) -> int:
        """Tokens n that were read."""
        return self.input_ids.shape[1]

    def before(self, layer: int) -> OpenCache | XLCache | None:
        """What the next tokens see before them in a layer."""
        return self.caches.get(layer) or self.bank.caches.get(layer)

    def append(self, input_ids: Tensor, pairs: SegmentPairs) -> None:
        """Add tokens (B, m) and their pairs.

        Raises:
            ValueError: where they are more than fit.
        """
        if self.count + input_ids.shape[1] > self.length:
            count = input_ids.shape[1]
            raise ValueError(f"{count} tokens do not fit: {self.count} of {self.length} are there")
        self.input_ids = torch.cat([self.input_ids.to(input_ids), input_ids], 1)
        for layer, pair in pairs.cache.items():
            if layer not in self.caches:
                cache = self.bank.caches.get(layer)
                self.caches[layer] = OpenCache.after(cache, pair, self.length)
            self.caches[layer].append(*pair)

    def pairs(self) -> SegmentPairs:
        """Those of all tokens that were read, for ``MemoryBank.commit``."""
        own = {layer: cache.own() for layer, cache in self.caches.items()}
        return SegmentPairs(own, own)

    def take(self, rows: Tensor, bank: MemoryBank) -> OpenSegment:
        """One whose row ``i`` holds what row ``rows[i]`` of this one holds.

        Args:
            rows: (B',).
            bank: what those rows read before.
        """
        taken = OpenSegment(bank, self.length)
        taken.input_ids = self.input_ids[rows.to(self.input_ids.device)]
        taken.caches = {layer: cache.take(rows) for layer, cache in self.caches.items()}
        if self.state is not None:
            taken.state = self.state.take(rows, bank)
        return taken
