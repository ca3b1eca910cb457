"""All that a model remembers of B rows: a memory for each memory layer, an XL cache for each layer.

Forward reads a bank and changes nothing; ``commit`` writes a segment, once, after the read;
``reset`` forgets rows. One bank serves one stage (train, validate, ...): banks are never shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import XLCache
from .loading import check_loadable
from .ring import Memory
from .view import MemoryView, Readable

Pairs = tuple[Tensor, Tensor]
"""A layer's keys and values of one segment, each (B, G, N, D)."""


class SegmentPairs(NamedTuple):
    """What a forward pass of one segment gives a bank to write, detached, by layer.

    The two kinds may differ: a rotary model stores unrotated keys in its memory and rotated ones in
    its cache.
    """

    memory: Mapping[int, Pairs]
    """For the memories."""
    cache: Mapping[int, Pairs]
    """For the XL caches."""


def check_tokens(name: str, of_tokens: Tensor | None, keys: Tensor) -> None:
    """Refuse what does not say one thing of each token of a segment.

    Args:
        name: of it, for the message.
        of_tokens: should be (B, N); None is fine.
        keys: (B, G, N, D) of the segment.

    Raises:
        ValueError: naming both shapes.
    """
    shape = (keys.shape[0], keys.shape[2])
    if of_tokens is not None and of_tokens.shape != shape:
        raise ValueError(
            f"{name} of shape {(*of_tokens.shape,)}: must be {shape}, as the segment is"
        )


class MemoryBank:
    """The state of B rows between two segments.

    Args:
        batch_size: rows B.
        memories: by layer index, the memories; layers without one just lack an entry. A view is
            only read: commit, reset, saving and loading leave it alone.
        caches: by layer index, the XL caches.
        needs_tokens: whether who reads it also reads the tokens behind the pairs.
    """

    def __init__(
        self,
        batch_size: int,
        memories: Mapping[int, Readable] | None = None,
        caches: Mapping[int, XLCache] | None = None,
        needs_tokens: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.needs_tokens = needs_tokens
        self.memories: dict[int, Any] = dict(memories or {})
        self.caches = dict(caches or {})

    def commit(
        self,
        pairs: SegmentPairs,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        step: int = 0,
    ) -> None:
        """Write one segment into every memory and cache, each on its own device.

        Args:
            pairs: what the forward pass of the segment returned.
            mask: (B, N) bool, True at real tokens; padding only at the right (on a GPU the mask
                is not looked at, as that would wait for it). None for all.
            token_ids: (B, N) the tokens of the segment, which copy heads and biases by match length
                read, and which explain retrievals later.
            step: the training step, kept to tell how stale a pair is.

        Raises:
            ValueError: where ``pairs`` holds another number of rows, the mask or the tokens do not
                have the segment's shape, padding is not at the right, or tokens are needed and not
                there.
        """
        if self.needs_tokens and token_ids is None and self._own():
            raise ValueError(
                "token_ids = None: this model copies or matches the tokens of its memory; give "
                "commit the segment's tokens, as in memory.commit(output.pairs, token_ids=inputs)"
            )
        for keys, _ in (*pairs.memory.values(), *pairs.cache.values()):
            self._check_rows(keys.shape[0])
            check_tokens("mask", mask, keys)
            check_tokens("token_ids", token_ids, keys)
        mask = None if mask is None else mask.bool()
        if mask is not None and mask.device.type == "cpu" and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "mask: padding must be at the right of a row, and a token follows some"
            )
        for layer, memory in self._own().items():
            memory.write(*pairs.memory[layer], mask=mask, token_ids=token_ids, step=step)
        for layer, cache in self.caches.items():
            cache.write(*pairs.cache[layer], mask=mask)

    def take(self, rows: Sequence[int]) -> MemoryBank:
        """A bank whose row ``i`` holds what row ``rows[i]`` of this one holds.

        Memories are shared by both until one of them calls ``own``; caches are copied.
        """

        def views(of: Sequence[int]) -> dict[int, MemoryView]:
            return {
                layer: MemoryView(memory.base, [memory.owner(row) for row in of])
                for layer, memory in self.memories.items()
            }

        shared = views(rows)
        self.memories = dict(views(range(self.batch_size)))
        index = torch.tensor([*rows], dtype=torch.int64)
        caches = {layer: cache.take(index) for layer, cache in self.caches.items()}
        return MemoryBank(len(rows), shared, caches, self.needs_tokens)

    def own(self) -> None:
        """Copy what is shared, so that it can be written."""
        for layer, memory in self.memories.items():
            if isinstance(memory, MemoryView):
                self.memories[layer] = memory.base.take(memory.owners)

    def reset(self, mask: Tensor | None = None, on_host: Tensor | None = None) -> None:
        """Forget the rows where ``mask`` is True, or all rows: they are as new.

        Args:
            mask: (B,) bool.
            on_host: the same on the CPU, where the caller has it; see ``Memory.reset``.
        """
        for memory in self._own().values():
            memory.reset(mask, on_host)
        for cache in self.caches.values():
            cache.reset(mask)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the bank, by name; the first dimension is the row."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, store in self._named_stores().items()
            for name, tensor in store.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` of a bank of as many rows gave.

        Sizes may differ; a memory or cache that the other bank lacked stays as it is.

        Raises:
            ValueError: where ``tensors`` hold another number of rows, or do not fit a memory or a
                cache; nothing is written then.
        """
        for tensor in tensors.values():
            self._check_rows(tensor.shape[0])
        stores = self._named_stores()
        given = {
            prefix: {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{prefix}.")
            }
            for prefix in stores
        }
        given = {prefix: own for prefix, own in given.items() if own}
        for prefix, own in given.items():
            check_loadable(own, stores[prefix].tensors(), prefix)
        for prefix, own in given.items():
            stores[prefix].load(own)

    def nbytes(self) -> int:
        """Bytes held, on whichever device."""
        return sum(store.nbytes() for store in self._stores())

    def _check_rows(self, rows: int) -> None:
        if rows != self.batch_size:
            raise ValueError(f"a bank of {self.batch_size} rows got {rows} rows")

    def _stores(self) -> list[Memory | XLCache]:
        return [*self._own().values(), *self.caches.values()]

    def _own(self) -> dict[int, Memory]:
        """The memories that are the bank's to write."""
        return {layer: m for layer, m in self.memories.items() if isinstance(m, Memory)}

    def _named_stores(self) -> dict[str, Memory | XLCache]:
        memories = {f"memory.{layer}": store for layer, store in self._own().items()}
        return {**memories, **{f"cache.{layer}": store for layer, store in self.caches.items()}}
