"""The memory of one layer: for every row a ring of the last M (key, value) pairs of its document.

Shapes: B rows, G key/value heads, M slots, N tokens of a segment, D head width.

A slot costs ``2 * G * D`` numbers in the storage dtype (``storage.py``) and 8 bytes of bookkeeping
(token id, step). Writing a segment costs O(N) per row, resetting a row O(1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from .loading import copy_pairs
from .rows import RowStore
from .snapshot import Snapshot
from .storage import SCALES, quantize, restore

if TYPE_CHECKING:
    from .search.protocol import Search


class Memory(RowStore):
    """A first-in, first-out store of detached pairs, never a module and never a buffer.

    A row's pair number ``i`` (counted from its last reset) lives in slot ``(i - origin) % size``;
    so the first ``used`` slots of a row hold a pair, whatever happened before. Pairs leave in the
    order they came: overwritten, or dropped, which only moves ``oldest``.

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
        self.size = size
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
        self.written = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) pairs written since the row's last reset."""
        self.origin = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) the first pair that counts; 0 but where a smaller memory, loaded, had lost some."""
        self.oldest = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) the first pair that was not dropped; those before it are never retrieved."""
        self.document = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) changes whenever a row does not continue what it held, for an index that is derived
        from the ring; not part of what defines the memory."""
        self.library: Memory | None = None
        """One row of pairs that every row reads too; never written."""
        self.search: Search | None = None
        """How it is searched; None for the search of whoever reads it."""
        self._most_written = 0
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

    @property
    def device(self) -> torch.device:
        """Where the pairs live."""
        return self.written.device

    @property
    def used(self) -> Tensor:
        """(B,) slots that hold a pair, those of dropped pairs among them."""
        return (self.written - self.origin).clamp(max=self.size)

    @property
    def fill(self) -> Tensor:
        """(B,) pairs that can be retrieved: the last so many of those written."""
        return torch.minimum(self.used, self.written - self.oldest)

    @property
    def max_fill(self) -> int:
        """An upper bound of ``used`` over the rows, known without waiting for the device."""
        return min(self._most_written, self.size)

    def valid(self, slots: int | None = None) -> Tensor:
        """(B, slots) bool: which of the first ``slots`` slots (default all) can be retrieved."""
        index = torch.arange(self.size if slots is None else slots, device=self.written.device)
        return (index < self.used[:, None]) & (self.age()[:, : len(index)] < self.fill[:, None])

    def retrievable(self) -> list[tuple[int, slice | Tensor]]:
        """For each row how many pairs can be retrieved, and an index of their slots.

        The index is a slice from 0 on where nothing was dropped. Waits for the device.
        """
        found: list[tuple[int, slice | Tensor]] = []
        counts = torch.stack([self.used, self.fill, self.written - self.origin]).tolist()
        for used, fill, end in zip(*counts, strict=True):
            numbers = torch.arange(end - fill, end, device=self.written.device)
            found.append((fill, slice(used) if fill == used else numbers % self.size))
        return found

    def age(self) -> Tensor:
        """(B, M) int64: pairs written to the row since the slot's own, 0 for the newest one."""
        newest = (self.written - self.origin)[:, None] - 1
        return (newest - torch.arange(self.size, device=newest.device)) % self.size

    @property
    def positions(self) -> Tensor:
        """(B, M) int64: offset in its document, in tokens, of the token behind a slot's pair.

        It is the pair's number, so nothing need be stored; 0 where no pair is held.
        """
        return (self.written[:, None] - 1 - self.age()).clamp(min=0)

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
        mask = mask.to(device)
        order = mask.cumsum(1) - 1
        count = order[:, -1] + 1
        position = self.written[:, None] + order
        kept = mask & (order >= count[:, None] - self.size)
        rows, tokens = kept.nonzero(as_tuple=True)
        positions = position[rows, tokens]
        slots = (positions - self.origin[rows]) % self.size
        for reading in self._snapshots:
            reading.keep(rows, slots)
        for name, new in (("keys", keys), ("values", values)):
            new = new.detach().to(device)[rows, :, tokens]
            scales: Tensor | None = getattr(self, SCALES[name])
            if scales is not None:
                new, scales[rows, :, slots] = quantize(new)
            stored: Tensor = getattr(self, name)
            stored[rows, :, slots] = new.to(stored.dtype)
        self.steps[rows, slots] = step
        if token_ids is not None:
            self.token_ids[rows, slots] = token_ids.to(device)[rows, tokens].to(torch.int32)
        self.written += count
        self._most_written += segment

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None) -> None:
        """Empty the rows where ``mask`` (B,) is True, or all rows."""
        if mask is None:
            self.document += 1
            self.written.zero_()
            self.origin.zero_()
            self.oldest.zero_()
            self._most_written = 0
        else:
            mask = mask.to(self.written.device)
            self.document += mask
            self.written.masked_fill_(mask, 0)
            self.origin.masked_fill_(mask, 0)
            self.oldest.masked_fill_(mask, 0)

    @torch.no_grad()
    def drop(self, count: Tensor) -> None:
        """Never retrieve the ``count`` (B,) oldest pairs of each row again."""
        self.oldest.copy_(self.written - self.fill + torch.minimum(count, self.fill))

    def end_at(self, count: int) -> None:
        """Take the first ``count`` slots of each row to hold its pairs 0 to ``count`` - 1."""
        self.written.fill_(count)
        self._most_written = count

    def drop_written_before(self, step: int) -> None:
        """Never retrieve again what was written before a training step."""
        # Pairs lie in the order of their steps, so the stale ones are the oldest.
        self.drop((self.valid() & (self.steps < step)).sum(1))

    @contextmanager
    def rewound(self, start: Tensor) -> Iterator[None]:
        """Within, rows end before pair ``start`` (B,), and writing goes over what follows.

        Afterwards rows end where they ended; what was not written over is as it was.

        Args:
            start: (B,) number of a pair that can be retrieved; rows that end before it keep all.
        """
        written, most_written = self.written.clone(), self._most_written
        with torch.no_grad():
            self.drop(torch.zeros_like(start))  # what was overwritten must not seem to come back
            self.document += start < written
            self.written.copy_(torch.minimum(start, written))
        try:
            yield
        finally:
            self._most_written = most_written
            with torch.no_grad():
                self.written.copy_(written)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the memory, by name; the first dimension is the row."""
        names = ["keys", "values", "token_ids", "steps"]
        names += ["written", "origin", "oldest"]
        if self.key_scales is not None:
            names += SCALES.values()
        # The bound decides what a search reads, and so how its sums round.
        bound = torch.full_like(self.written, self._most_written)
        return {**{name: getattr(self, name) for name in names}, "bound": bound}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, also from a memory of another size or storage dtype.

        A smaller memory keeps the newest pairs.
        """
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
        self._most_written = int(tensors["bound"].max())
        copy_pairs(tensors, self, origin)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
