"""The memory of one layer: for every row a ring of the last M (key, value) pairs of its document.

Shapes: B rows, G key/value heads, M slots, N tokens of a segment, D head width.

A slot costs ``2 * G * D`` numbers in the storage dtype (``storage.py``) and 8 bytes of bookkeeping
(token id, step). Writing a segment costs O(N) per row, resetting a row O(1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from .loading import check_loadable, copy_pairs
from .slots import Slots
from .snapshot import Snapshot
from .storage import SCALES, quantize, restore
from .writing import writes

if TYPE_CHECKING:
    from .search.protocol import Search


class Memory(Slots):
    """A first-in, first-out store of detached pairs, never a module and never a buffer.

    Args:
        batch_size: rows B.
        num_kv_heads: key/value heads G.
        size: slots M per row.
        head_dim: width D of a key and of a value.
        dtype: storage dtype of keys and values, one of ``STORAGE_DTYPES``.
        device: where the pairs live.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        size: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        pairs = (batch_size, num_kv_heads, size, head_dim)
        slots = (batch_size, size)
        super().__init__(batch_size, size, device)
        self.keys = torch.zeros(pairs, dtype=dtype, device=device)
        self.values = torch.zeros(pairs, dtype=dtype, device=device)
        self.key_scales: Tensor | None = None
        """(B, G, M) fp32, factor of each stored key; None unless stored as int8."""
        self.value_scales: Tensor | None = None
        if dtype == torch.int8:
            self.key_scales = torch.zeros(pairs[:3], dtype=torch.float32, device=device)
            self.value_scales = torch.zeros_like(self.key_scales)
        self.token_ids = torch.zeros(slots, dtype=torch.int32, device=device)
        """(B, M) the token that a slot's pair was computed from."""
        self.steps = torch.zeros(slots, dtype=torch.int32, device=device)
        """(B, M) the training step whose weights wrote it."""
        self.library: Memory | None = None
        """One row of pairs that every row reads too; never written."""
        self.search: Search | None = None
        """How it is searched; None for the search of whoever reads it."""
        self._snapshots: WeakSet[Snapshot] = WeakSet()

    def snapshot(self) -> Snapshot:
        """The pairs as of now, for a backward pass that may come after later writes."""
        stores = [getattr(self, name) for name in (*SCALES, *SCALES.values())]
        reading = Snapshot([store for store in stores if store is not None])
        self._snapshots.add(reading)
        return reading

    def __getstate__(self) -> dict[str, Any]:
        # Backward passes that may still come are this process's own, and so are weak references.
        return {**self.__dict__, "_snapshots": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._snapshots = WeakSet()

    def keys_at(self, index: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Keys in a floating dtype, restored if stored as int8; perhaps a view, so not to change.

        Args:
            index: of the (B, G, M) stored keys.
            dtype: of the result.
        """
        scales = None if self.key_scales is None else self.key_scales[index]
        return restore(self.keys[index], scales, dtype)

    owners: None = None
    """Every row reads its own; ``MemoryView`` maps rows otherwise."""

    @property
    def base(self) -> Memory:
        """The memory that is read: this one."""
        return self

    @staticmethod
    def owner(row: int) -> int:
        """The row of the memory that a reading row reads: its own."""
        return row

    @torch.no_grad()
    def write(
        self,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        step: int = 0,
    ) -> None:
        """Append a segment's pairs, overwriting the oldest.

        What lies on another device is copied to the memory's.

        Args:
            keys: (B, G, N, D), as the layer used them (normalised where it normalises).
            values: (B, G, N, D).
            mask: (B, N) bool, True at real tokens, or None for all; the rest is not written.
            token_ids: (B, N) the tokens behind the pairs.
            step: the training step that computed them.
        """
        batch, _, segment, _ = keys.shape
        device = self.device
        if mask is None:
            mask = torch.ones(batch, segment, dtype=torch.bool, device=device)
        plan = writes(mask.to(device), self.written, self.origin, self.size)
        for reading in self._snapshots:
            reading.keep(plan.rows, plan.slots)
        for name, new in (("keys", keys), ("values", values)):
            new = plan.of(new.detach().to(device))
            scales: Tensor | None = getattr(self, SCALES[name])
            if scales is not None:
                new, new_scales = quantize(new)
                plan.put(scales, new_scales)
            plan.put(getattr(self, name), new)
        plan.put(self.steps, step)
        if token_ids is not None:
            plan.put(self.token_ids, plan.of(token_ids.to(device)))
        self.written += plan.counts
        self.bound = self.bound + segment
        self.offered += segment

    def drop_written_before(self, step: int) -> None:
        """Never retrieve again what was written before a training step."""
        # Pairs lie in the order of their steps, so the stale ones are the oldest.
        self.drop((self.valid() & (self.steps < step)).sum(1))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the memory, by name; the first dimension is the row."""
        names = ["keys", "values", "token_ids", "steps"]
        names += ["written", "origin", "oldest"]
        if self.key_scales is not None:
            names += SCALES.values()
        # The bound decides what a search reads, and so how its sums round.
        return {name: getattr(self, name) for name in (*names, "bound")}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, also from a memory of another size or storage dtype.

        A smaller memory keeps the newest pairs.

        Raises:
            ValueError: where ``tensors`` are of other rows, heads or widths; nothing is written.
        """
        check_loadable(tensors, self.tensors(), "memory")
        if self._snapshots:
            # Backward passes that may still come read the old stores.
            for name in (*SCALES, *SCALES.values()):
                store = getattr(self, name)
                setattr(self, name, None if store is None else torch.zeros_like(store))
            self._snapshots = WeakSet()
        self.document += 1
        written, origin = tensors["written"], tensors["origin"].clone()
        old_size = tensors["keys"].shape[2]
        # A larger memory must not count what the smaller one had already overwritten.
        lost = written - old_size if self.size > old_size else origin
        self.origin.copy_(torch.maximum(origin, lost))
        # Checkpoints of earlier versions know of no dropped pairs.
        self.oldest.copy_(tensors.get("oldest", origin))
        self.written.copy_(written)
        self.bound = tensors["bound"].to("cpu", torch.int64, copy=True)
        self.offered += self.size
        copy_pairs(tensors, self, origin)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
