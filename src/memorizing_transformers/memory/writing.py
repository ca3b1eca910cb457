"""Which token of a segment goes to which slot of a ring.

To ask which tokens are real would make the host wait for a GPU. So there each row writes the same
number of slots, W. Where a row has fewer pairs to write, its other slots get what they hold
already. A CPU answers at once, so there only the real tokens are written.

Shapes: B rows, N tokens of a segment, M slots, W = min(N, M), P slots written in all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Writes(NamedTuple):
    """Where the newest pairs of a segment go; no slot is written twice."""

    rows: Tensor
    """(P,) int64 the row."""
    slots: Tensor
    """(P,) int64 the slot."""
    tokens: Tensor
    """(P,) int64 the place in the segment of the token that goes there."""
    real: Tensor | None
    """(P,) bool, False where a slot is to stay as it is; None where none is."""
    counts: Tensor
    """(B,) int64 real tokens of the segment, also those that more than M others follow."""

    def put(self, store: Tensor, new: Tensor | int) -> None:
        """Write into a store, in place.

        Args:
            store: (B, G, M, ...) or (B, M).
            new: by written slot, (P, G, ...) or (P,), or one number for all.
        """
        at = (self.rows, self.slots) if store.ndim == 2 else (self.rows, slice(None), self.slots)
        if isinstance(new, int):
            new = torch.full_like(self.slots, new)
        new = new.to(store.dtype)
        if self.real is not None:
            new = torch.where(self.real.view(-1, *[1] * (new.ndim - 1)), new, store[at])
        store[at] = new

    def of(self, segment: Tensor) -> Tensor:
        """What is written of a segment's (B, G, N, ...) or (B, N): (P, G, ...) or (P,)."""
        if segment.ndim == 2:
            return segment[self.rows, self.tokens]
        return segment[self.rows, :, self.tokens]


def writes(mask: Tensor, written: Tensor, origin: Tensor, size: int) -> Writes:
    """Where a segment's pairs go.

    Args:
        mask: (B, N) bool, True at real tokens, anywhere in the segment.
        written: (B,) pairs that were written before.
        origin: (B,) number of the pair in slot 0, as in ``Memory``.
        size: slots M.
    """
    batch, segment = mask.shape
    device = mask.device
    order = mask.cumsum(1) - 1
    count = order[:, -1] + 1
    first = written - origin
    if device.type == "cpu":
        rows, tokens = (mask & (order >= count[:, None] - size)).nonzero(as_tuple=True)
        return Writes(rows, (first[rows] + order[rows, tokens]) % size, tokens, None, count)
    # The place of the real token of each number; what is not real goes to one place too many.
    place = torch.zeros(batch, segment + 1, dtype=torch.int64, device=device)
    numbers = torch.arange(segment, device=device).expand(batch, -1)
    place.scatter_(1, order.masked_fill(~mask, segment), numbers)
    # From the newest real token back.
    back = count[:, None] - 1 - torch.arange(min(segment, size), device=device)
    row = torch.arange(batch, device=device)[:, None].expand_as(back)
    slots = (first[:, None] + back) % size
    tokens = place.gather(1, back.clamp(min=0))
    real = back >= 0
    return Writes(row.flatten(), slots.flatten(), tokens.flatten(), real.flatten(), count)
