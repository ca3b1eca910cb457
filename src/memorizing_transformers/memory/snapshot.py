"""What a memory held when it was read, for a backward pass that runs after later writes.

A training step commits before its backward pass, and the ring overwrites in place. Instead of a
copy of everything that was retrieved, a reading keeps the few pairs that are overwritten while a
backward pass may still come: N per row and commit. The backward pass takes these in place of what
the ring now holds there, and changes nothing: others may read the memory meanwhile.

Shapes: B rows, G key/value heads, M slots, P pairs kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """The pairs of a memory as of now.

    Args:
        stores: the memory's own tensors, each (B, G, M, ...).
    """

    def __init__(self, stores: Sequence[Tensor]) -> None:
        self._stores = list(stores)
        self._kept: list[list[Tensor]] = []
        """By write and by store, the pairs (P, G, ...) that it went over."""
        self._place: Tensor | None = None
        """(B, G, M) int32 where the entry is among all that were kept, as (P * G, ...), or -1."""

    def keep(self, rows: Tensor, slots: Tensor) -> None:
        """Take a copy of the pairs at ``rows`` and ``slots`` (P,), which are about to change."""
        groups = self._stores[0].shape[1]
        if self._place is None:
            shape = self._stores[0].shape[:3]
            self._place = torch.full(shape, -1, dtype=torch.int32, device=rows.device)
        first = groups * sum(len(kept[0]) for kept in self._kept)
        last = first + groups * len(rows)
        number = torch.arange(first, last, dtype=torch.int32, device=rows.device)
        self._kept.append([store[rows, :, slots] for store in self._stores])
        place = self._place[rows, :, slots]
        # Of a slot that is overwritten twice, the first copy is what was read.
        self._place[rows, :, slots] = torch.where(place < 0, number.view_as(place), place)

    def _places(self, index: Tensor) -> Tensor | None:
        """(n,) where the entries at flat indices are among what was kept; None for nowhere."""
        if self._place is None or not any(len(kept[0]) for kept in self._kept):
            return None
        return self._place.view(-1).index_select(0, index)

    def differs(self, index: Tensor) -> bool:
        """Whether some of the entries at flat indices were overwritten; waits for the device."""
        places = self._places(index)
        return places is not None and bool((places >= 0).any())

    def select(self, store: Tensor, index: Tensor) -> Tensor:
        """Entries (n, ...) of a store as they were when this reading was taken.

        Args:
            store: one of the memory's tensors.
            index: (n,) flat indices into its first three dimensions.
        """
        now = store.flatten(0, 2).index_select(0, index)
        # Looked up after the store: what is overwritten meanwhile was noted before.
        places = self._places(index)
        if places is None:
            return now
        which = next(number for number, own in enumerate(self._stores) if own is store)
        kept = torch.cat([stores[which] for stores in self._kept]).flatten(0, 1)
        old = places >= 0
        if now.device.type == "cpu":
            at = old.nonzero().squeeze(1)
            return now.index_copy_(0, at, kept.index_select(0, places.index_select(0, at)))
        # Finding them costs a wait on a GPU.
        past = kept.index_select(0, places.clamp(min=0))
        return torch.where(old.view(-1, *[1] * (now.ndim - 1)), past, now)
