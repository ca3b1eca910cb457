"""Finding, for every query, the slots of its row's memory with the largest inner products.

Shapes: B rows, G key/value heads, Q queries of a head group, M slots, K neighbours, D head width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

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


def make_search(name: str, recall_target: float = 0.95, score_bytes: int | None = None) -> Search:
    """The backend of that name.

    Args:
        name: one of ``SEARCHES``.
        recall_target: expected share of the true neighbours, for approximate searches.
        score_bytes: bytes of scores that ``exact`` and ``bucketed`` may hold at once; None for what
            suits the device.

    Raises:
        ImportError: where a faiss search is asked for and faiss is not installed.
        ValueError: where there is no search of that name.
    """
    from .auto import AutoSearch
    from .bucketed import BucketedSearch
    from .exact import ExactSearch
    from .reference import reference_search

    if name == "reference":
        return reference_search
    if name == "exact":
        return ExactSearch(score_bytes)
    if name == "bucketed":
        return BucketedSearch(recall_target, score_bytes)
    if name == "auto":
        return AutoSearch(recall_target, score_bytes)
    if name in FAISS_KINDS:
        from .indexes import FaissSearch

        return FaissSearch(FAISS_KINDS[name], recall_target)
    raise ValueError(f"no search named {name!r}; there is {', '.join(SEARCHES)}")


FAISS_KINDS: dict[str, Literal["flat", "ivf", "hnsw"]] = {
    "faiss": "ivf",
    "faiss-flat": "flat",
    "faiss-ivf": "ivf",
    "faiss-hnsw": "hnsw",
}
"""The kind of index behind each name; ``faiss`` alone is the one that grows best."""

SEARCHES = ("auto", "exact", "bucketed", *FAISS_KINDS, "reference")
"""What ``make_search`` knows."""
