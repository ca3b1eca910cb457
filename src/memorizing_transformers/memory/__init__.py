"""External memory for attention: rings of pairs, their search, attention over what was found.

Plain torch. Knows keys, values, rows and ages, never a particular transformer.
"""

from .attend import MemoryAttention, attend, merge, scores_of
from .bank import MemoryBank, Pairs, SegmentPairs
from .cache import XLCache
from .lent import LentMemory, can_lend, lend
from .mapped import mapped
from .open_segment import OpenCache, OpenSegment
from .placed import PlacedMemory
from .refresh import drop_drifted, refresh
from .repeats import Repeats, RepeatSearch
from .ring import Memory
from .search import SEARCHES, Neighbours, Search, make_search
from .storage import STORAGE_DTYPES
from .view import MemoryView, Readable

__all__ = [
    "SEARCHES",
    "STORAGE_DTYPES",
    "LentMemory",
    "Memory",
    "MemoryAttention",
    "MemoryBank",
    "MemoryView",
    "Neighbours",
    "OpenCache",
    "OpenSegment",
    "Pairs",
    "PlacedMemory",
    "Readable",
    "RepeatSearch",
    "Repeats",
    "Search",
    "SegmentPairs",
    "XLCache",
    "attend",
    "can_lend",
    "drop_drifted",
    "lend",
    "make_search",
    "mapped",
    "merge",
    "refresh",
    "scores_of",
]
