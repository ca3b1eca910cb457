"""Memories read by rows that need not own them, and never written through.

Shapes: B' reading rows, B rows of the memory, G key/value heads, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ring import Memory
from .snapshot import Snapshot


class MemoryView:
    """A memory as other rows see it: row ``i`` reads what row ``owners[i]`` of the memory holds.

    Searches and attention take a view wherever they take a memory. Nothing is copied, and a view
    follows what is written to its memory. To write through a view is an error.

    Args:
        memory: what is read.
        owners: for each reading row a row of the memory; several may read the same one.

    Raises:
        ValueError: where the memory has no such row.
    """

    def __init__(self, memory: Memory, owners: Sequence[int]) -> None:
        rows = memory.keys.shape[0]
        if not all(0 <= owner < rows for owner in owners):
            raise ValueError(f"owners = {list(owners)}: the memory has rows 0 to {rows - 1}")
        self.memory = memory
        self.rows = list(owners)
        self.owners = torch.tensor(self.rows, dtype=torch.int64, device=memory.device)
        """(B',) by reading row, the row of the memory."""
        self.size = memory.size

    def __getattr__(self, name: str) -> Any:
        # The stores themselves; whoever reads them maps rows by ``owners``.
        if name in (
            "keys",
            "values",
            "key_scales",
            "value_scales",
            "device",
            "library",
            "search",
        ):
            return getattr(self.memory, name)
        # What the memory knows of each of its rows, as of these rows.
        if name in ("token_ids", "steps", "positions", "written", "origin", "oldest", "document",
                    "used", "fill"):  # fmt: skip
            return getattr(self.memory, name)[self.owners]
        raise AttributeError(f"a view of a memory has no {name!r}")

    @property
    def bounds(self) -> list[int]:
        """By reading row an upper bound of ``used``, known without waiting for the device."""
        bounds = self.memory.bounds
        return [bounds[row] for row in self.rows]

    @property
    def max_fill(self) -> int:
        """The largest of them."""
        return max(self.bounds, default=0)

    @property
    def base(self) -> Memory:
        """The memory that is read."""
        return self.memory

    def owner(self, row: int) -> int:
        """The row of the memory that a reading row reads."""
        return self.rows[row]

    def snapshot(self) -> Snapshot:
        """The pairs as of now, for a backward pass that may come after later writes."""
        return self.memory.snapshot()

    def keys_at(self, index: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Keys in a floating dtype, as ``Memory.keys_at`` gives them.

        Args:
            index: of (B', G, M) keys: an ellipsis, or a tuple that begins with a row or a slice.
            dtype: of the result.
        """
        if index is Ellipsis:
            return self.memory.keys_at(self.owners, dtype)
        row, *rest = index
        rows = self.rows[row] if isinstance(row, int) else self.owners[row]
        return self.memory.keys_at((rows, *rest), dtype)

    def valid(self, slots: int | None = None) -> Tensor:
        """(B', slots) bool: which of the first ``slots`` slots (default all) can be retrieved."""
        return self.memory.valid(slots)[self.owners]

    def retrievable(self) -> list[tuple[int, slice | Tensor]]:
        """For each reading row how many pairs can be retrieved, and an index of their slots."""
        found = self.memory.retrievable()
        return [found[owner] for owner in self.rows]

    def age(self) -> Tensor:
        """(B', M) int64: pairs written to the row since the slot's own, 0 for the newest one."""
        return self.memory.age()[self.owners]


Readable = Memory | MemoryView
"""What can be searched and attended to."""
