"""The automatic choice of a search, by device and by memory size, with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from ..view import Readable
from .cells import cells_pay
from .kernels.int8_scan import has_fast_int8
from .policy import QUANTIZED_SLOTS, ROUGH_SLOTS
from .protocol import Neighbours, Search

logger = logging.getLogger(__name__)

EXACT_UP_TO = {"cpu": QUANTIZED_SLOTS if has_fast_int8() else ROUGH_SLOTS, "cuda": 8192}
"""Slots up to which an exact search costs about as much as an approximate one; measured on a CPU,
not yet on a GPU."""
SCAN_UP_TO = 2**20
"""Slots beyond which a host searches an index. An index is faster much earlier, but what it finds
depends on when it was built, so a resumed run would not repeat an unbroken one bit for bit."""


class Choice(NamedTuple):
    """A search and why."""

    name: str
    reason: str


def choose_search(device: str, size: int, rows: int, heads: int, queries: int) -> Choice:
    """The search that suits a memory.

    Args:
        device: type of the device that holds the memory, cpu or cuda.
        size: slots M a row.
        rows: rows B.
        heads: key/value heads G.
        queries: queries of a head group Q.
    """
    pairs = f"{rows} rows x {heads} heads x {size} slots on {device}"
    scans = size <= SCAN_UP_TO and device == "cpu" and not has_fast_int8()
    if scans and cells_pay(size, queries):
        return Choice("cells", f"{pairs}, {queries} queries: most keys need not be scored")
    bound = EXACT_UP_TO.get(device, EXACT_UP_TO["cuda"])
    if size <= bound:
        return Choice("exact", f"{pairs}: up to {bound} slots the exact search costs no more")
    if device == "cpu" and size > SCAN_UP_TO and find_spec("faiss") is not None:
        return Choice("faiss", f"{pairs}: beyond {SCAN_UP_TO} slots a scan would take too long")
    return Choice("bucketed", f"{pairs}: beyond {bound} slots one approximate pass is cheaper")


class AutoSearch:
    """Chooses at the first search, says so in the log, and stays with it.

    Args:
        make: makes the search of a name.
    """

    def __init__(self, make: Callable[[str], Search]) -> None:
        self.make = make
        self.choice: Choice | None = None
        self._search: Search | None = None

    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        if self._search is None:
            batch, groups, size, _ = memory.keys.shape
            device, count = memory.keys.device.type, queries.shape[2]
            self.choice = choose_search(device, size, batch, groups, count)
            self._search = self.make(self.choice.name)
            logger.info("memory search: %s (%s)", *self.choice)
        return self._search(queries, memory, top_k)
