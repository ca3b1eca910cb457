"""Finding, for every query, the slots of its row's memory with the largest inner products.

Shapes: B rows, G key/value heads, Q queries of a head group, M slots, K neighbours, D head width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..ring import Memory


class Neighbours(NamedTuple):
    """What a search returns."""

    slots: Tensor
    """(B, G, Q, K) int64 slots of the row's ring, best first; any number where not ``valid``."""
    valid: Tensor
    """(B, G, Q, K) bool; False where the row holds fewer than K pairs."""


class Search(Protocol):
    """A search backend: reads a memory, changes nothing, takes detached queries."""

    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        """Find ``top_k`` neighbours of queries (B, G, Q, D) in their own row and head."""


def make_search(name: str, recall_target: float = 0.95) -> Search:
    """The backend of that name.

    Args:
        name: one of ``SEARCHES``.
        recall_target: expected share of the true neighbours, for ``bucketed``.
    """
    from .bucketed import BucketedSearch
    from .exact import ExactSearch
    from .reference import reference_search

    if name == "reference":
        return reference_search
    if name == "exact":
        return ExactSearch()
    if name == "bucketed":
        return BucketedSearch(recall_target)
    raise ValueError(f"no search named {name!r}; there is {', '.join(SEARCHES)}")


SEARCHES = ("exact", "bucketed", "reference")
