"""The contract of a search: what it is asked, what it returns, and the facts of a backend.

Shapes: B rows, G key/value heads, Q queries of a head group, K neighbours, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..view import Readable


class Neighbours(NamedTuple):
    """What a search returns."""

    slots: Tensor
    """(B, G, Q, K) int64 slots of the row's ring, best first; any number where not ``valid``."""
    valid: Tensor
    """(B, G, Q, K) bool; False where the row holds fewer than K pairs."""


class Search(Protocol):
    """Reads a memory, changes nothing, takes detached queries."""

    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        """Find ``top_k`` neighbours of queries (B, G, Q, D) in their own row and head."""


@dataclass(frozen=True)
class Backend:
    """A search that can be chosen by name, and its facts."""

    build: Callable[[float, int | None], Search]
    """Makes the search. Takes the expected share of the true neighbours, for approximate searches,
    and the bytes of scores that may live at once, None for what suits the device."""
    approximate: bool = False
    """Whether it may miss neighbours."""
    index_bytes: Callable[[int], int] | None = None
    """Bytes on the host for each stored key of width D, where the search keeps an index."""
