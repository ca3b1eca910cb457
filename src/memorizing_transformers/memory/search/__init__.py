"""Finding, for every query, the slots of its row's memory with the largest inner products.

To add a search, write it as ``protocol.Search`` says and enter it into ``SEARCHES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .auto import AutoSearch
from .bucketed import BucketedSearch
from .cells import CellSearch
from .exact import ExactSearch
from .kernels.cell_scan import CELL, HALVES
from .protocol import Backend, Neighbours, Search
from .reference import reference_search

__all__ = ["SEARCHES", "Backend", "Neighbours", "Search", "is_approximate", "make_search"]


def _faiss(kind: str) -> Callable[[float, int | None], Search]:
    def build(recall_target: float, score_bytes: int | None) -> Search:
        from .faiss_index import FaissSearch

        return FaissSearch(kind, recall_target)  # type: ignore[arg-type]

    return build


def _auto(recall_target: float, score_bytes: int | None) -> Search:
    return AutoSearch(partial(make_search, recall_target=recall_target, score_bytes=score_bytes))


def _cell_bytes(width: int) -> int:
    # A copy of the key, its slot, and its part of what is kept of half a cell.
    return 4 * width + 8 + 4 * (width + 1) * HALVES // CELL


def _ivf_bytes(width: int) -> int:
    return 4 * width + 8


def _hnsw_bytes(width: int) -> int:
    return 4 * width + 8 + 128  # the links


SEARCHES: dict[str, Backend] = {
    "auto": Backend(_auto),
    "exact": Backend(lambda recall_target, score_bytes: ExactSearch(score_bytes)),
    "bucketed": Backend(BucketedSearch, approximate=True),
    "cells": Backend(CellSearch, approximate=True, index_bytes=_cell_bytes),
    "faiss": Backend(_faiss("ivf"), approximate=True, index_bytes=_ivf_bytes),
    "faiss-flat": Backend(_faiss("flat")),
    "faiss-ivf": Backend(_faiss("ivf"), approximate=True, index_bytes=_ivf_bytes),
    "faiss-hnsw": Backend(_faiss("hnsw"), approximate=True, index_bytes=_hnsw_bytes),
    "reference": Backend(lambda recall_target, score_bytes: reference_search),
}
"""By their name in ``model.memory.search``."""


def make_search(name: str, recall_target: float = 0.95, score_bytes: int | None = None) -> Search:
    """The search of that name.

    Args:
        name: one of ``SEARCHES``.
        recall_target: expected share of the true neighbours, for approximate searches.
        score_bytes: bytes of scores that may live at once; None for what suits the device.

    Raises:
        ImportError: where a faiss search is asked for and faiss is not installed.
        ValueError: where there is no search of that name.
    """
    if name not in SEARCHES:
        raise ValueError(f"no search named {name!r}; there is {', '.join(SEARCHES)}")
    return SEARCHES[name].build(recall_target, score_bytes)


def is_approximate(name: str, search: Search) -> bool:
    """Whether a search of that name may miss neighbours; of ``auto`` what it chose is asked."""
    choice = getattr(search, "choice", None) if name == "auto" else None
    return SEARCHES[name if choice is None else choice.name].approximate
