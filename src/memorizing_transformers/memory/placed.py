"""A memory that leaves out the first pairs of each segment and knows where the others come from.

The first token of a text is an attention sink in a pretrained model: its key matches every query.
Stored, the sinks of all segments would fill every retrieval.

Shapes: B rows, G key/value heads, M slots, N tokens of a segment, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .ring import Memory
from .writing import writes


class PlacedMemory(Memory):
    """A ``Memory`` with the position of each pair's token, in tokens since the row's last reset.

    Args:
        shape: the arguments of ``Memory``.
        skip_first: pairs at the start of each segment that are not stored.
    """

    def __init__(self, *shape: Any, skip_first: int = 1, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.skip_first = skip_first
        self.places = torch.zeros_like(self.token_ids)
        """(B, M) position of the token behind a slot's pair."""
        self.read = torch.zeros_like(self.written)
        """(B,) tokens read since the row's last reset, stored or not."""

    @property
    def positions(self) -> Tensor:
        """(B, M) int64: offset in its document, in tokens, of the token behind a slot's pair."""
        return self.places.long()

    @torch.no_grad()
    def write(
        self,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        step: int = 0,
    ) -> None:
        """Append a segment's pairs, without its first ones; see ``Memory.write``."""
        if mask is None:
            mask = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=self.device)
        mask = mask.to(self.device)
        order = mask.cumsum(1) - 1
        stored = mask & (order >= self.skip_first)
        plan = writes(stored, self.written, self.origin, self.size)
        super().write(keys, values, stored, token_ids, step)
        plan.put(self.places, plan.of(self.read[:, None] + order))
        self.read += mask.sum(1)

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None, on_host: Tensor | None = None) -> None:
        """Empty the rows where ``mask`` (B,) is True, or all rows; see ``Memory.reset``."""
        super().reset(mask, on_host)
        if mask is None:
            self.read.zero_()
        else:
            self.read.masked_fill_(mask.to(self.device), 0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the memory, by name; the first dimension is the row."""
        return {**super().tensors(), "places": self.places, "read": self.read}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` of a memory of this kind gave."""
        super().load(tensors)
        self.read.copy_(tensors["read"])
