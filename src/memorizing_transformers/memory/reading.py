"""What a memory held when it was read, for a backward pass that runs after later writes.

A training step commits before its backward pass, and the ring overwrites in place. Instead of a
copy of everything that was retrieved, a reading keeps the few pairs that are overwritten while a
backward pass may still come: N per row and commit. It puts them back for as long as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Reading:
    """The pairs of a memory as of now; whoever holds it can have them back.

    Args:
        stores: the memory's own tensors (B, G, M, ...), by name.
    """

    def __init__(self, stores: Mapping[str, Tensor]) -> None:
        self._stores = dict(stores)
        self._overwritten: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def keep(self, rows: Tensor, slots: Tensor) -> None:
        """Take a copy of the pairs at ``rows`` and ``slots`` (n,), which are about to change."""
        old = {name: store[rows, :, slots] for name, store in self._stores.items()}
        self._overwritten.append((rows, slots, old))

    def _swap(self, rows: Tensor, slots: Tensor, other: dict[str, Tensor]) -> None:
        for name, store in self._stores.items():
            current = store[rows, :, slots]
            store[rows, :, slots] = other[name]
            other[name] = current

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, the memory's tensors hold what they held when this reading was taken."""
        with torch.no_grad():
            for change in reversed(self._overwritten):
                self._swap(*change)
        try:
            yield
        finally:
            with torch.no_grad():
                for change in self._overwritten:
                    self._swap(*change)
