"""What a ring knows of its slots: how many hold a pair, which can be retrieved, how old they are.

Shapes: B rows, M slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .rows import RowStore


class Slots(RowStore):
    """The counts of B rings.

    A row's pair number ``i`` (counted from its last reset) lives in slot ``(i - origin) % size``;
    so the first ``used`` slots of a row hold a pair, whatever happened before. Pairs leave in the
    order they came: overwritten, or dropped, which only moves ``oldest``.

    Args:
        batch_size: rows B.
        size: slots M per row.
        device: where the counts live.
    """

    def __init__(self, batch_size: int, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.written = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) pairs written since the row's last reset."""
        self.origin = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) the first pair that counts; 0 but where a smaller memory, loaded, had lost some."""
        self.oldest = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) the first pair that was not dropped; those before it are never retrieved."""
        self.document = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) changes whenever a row does not continue what it held, for an index that is derived
        from the ring; not part of what defines the memory."""
        self.bound = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        """(B,) on the CPU: at least as many slots as hold a pair, known without waiting for the
        device. Exact but for padding. Replaced and never changed."""
        self.offered = 0
        """Grows with every write by at least as many pairs as a row may have got; for an index that
        is derived from the ring."""

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
        return max(self.bounds, default=0)

    @property
    def bounds(self) -> list[int]:
        """By row an upper bound of ``used``, known without waiting for the device."""
        bounds: list[int] = self.bound.clamp(max=self.size).tolist()
        return bounds

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
    def reset(self, mask: Tensor | None = None, on_host: Tensor | None = None) -> None:
        """Empty the rows where ``mask`` is True, or all rows.

        Args:
            mask: (B,) bool.
            on_host: the same on the CPU, where the caller has it. Without it, ``bound`` does not
                fall if ``mask`` is on another device: to ask would wait.
        """
        if mask is None:
            self.document += 1
            self.written.zero_()
            self.origin.zero_()
            self.oldest.zero_()
            self.bound = torch.zeros_like(self.bound)
        else:
            own = mask.to(self.device)
            known = [m for m in (on_host, mask, own) if m is not None and m.device.type == "cpu"]
            if known:
                self.bound = self.bound.masked_fill(known[0], 0)
            mask = own
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
        self.bound = torch.full_like(self.bound, count)
        self.offered += count

    @contextmanager
    def rewound(self, start: Tensor) -> Iterator[None]:
        """Within, rows end before pair ``start`` (B,), and writing goes over what follows.

        Afterwards rows end where they ended; what was not written over is as it was.

        Args:
            start: (B,) number of a pair that can be retrieved; rows that end before it keep all.
        """
        written, bound = self.written.clone(), self.bound
        with torch.no_grad():
            self.drop(torch.zeros_like(start))  # what was overwritten must not seem to come back
            self.document += start < written
            self.offered += self.size
            self.written.copy_(torch.minimum(start, written))
        try:
            yield
        finally:
            self.bound = bound
            self.offered += self.size
            with torch.no_grad():
                self.written.copy_(written)
