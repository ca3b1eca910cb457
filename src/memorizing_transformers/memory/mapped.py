"""Pairs of many documents in files, read by all rows and never written: a memory that maps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from .ring import Memory
from .search import Search

Kind = TypeVar("Kind", bound=Memory)


def mapped(memory: Kind, tensors: Mapping[str, Tensor], written: int, search: Search) -> Kind:
    """Let a memory of one row hold stores of another size themselves, not copies of them.

    Args:
        memory: an empty one, of the wanted kind.
        tensors: what ``Memory.tensors`` gives of each slot; pair ``i`` in slot ``i``.
        written: pairs that they hold.
        search: how they are searched.
    """
    for name, tensor in tensors.items():
        setattr(memory, name, tensor)
    memory.size = memory.keys.shape[2]
    memory.end_at(written)
    memory.search = search
    return memory
