"""An XL cache that keeps the first pairs of a document.

A pretrained model puts the attention that it does not need on the first tokens (Xiao et al., 2023,
arXiv 2309.17453). A cache that has lost them would make every segment much worse.

Shapes: B rows, G key/value heads, W cached tokens, N tokens of a segment, D head width, s sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..memory import XLCache


class SinkCache(XLCache):
    """The last W pairs of a row; once it is full, the leftmost places hold the document's first.

    Args:
        shape: the arguments of ``XLCache``.
        sinks: first pairs s of a document that stay; at most W.
    """

    def __init__(self, *shape: Any, sinks: int = 1, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.sinks = min(sinks, self.size)
        self.first_keys = self.keys[:, :, : self.sinks].clone()
        self.first_values = self.values[:, :, : self.sinks].clone()
        self.read = torch.zeros_like(self.length)
        """(B,) tokens read since the row's last reset."""

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Shift a segment in; see ``XLCache.write``."""
        before = self.read
        super().write(keys, values, mask)
        count = torch.full_like(before, keys.shape[2])
        if mask is not None:
            count = mask.sum(1).to(before)
        self.read = before + count
        place = torch.arange(self.sinks, device=before.device)
        # Where in the segment the sinks are that were not seen before.
        index = place - before[:, None]
        new = (index >= 0) & (index < count[:, None])
        index = index.clamp(0, keys.shape[2] - 1)
        index = index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        for name, given in (("keys", keys), ("values", values)):
            first: Tensor = getattr(self, f"first_{name}")
            found = given.detach().to(first).gather(2, index)
            first = torch.where(new[:, None, :, None], found, first)
            setattr(self, f"first_{name}", first)
        self._keep_first()

    def _keep_first(self) -> None:
        """Put the document's first pairs at the left of the rows that have lost them."""
        full = (self.read > self.size)[:, None, None, None]
        for name in ("keys", "values"):
            stored: Tensor = getattr(self, name)
            first: Tensor = getattr(self, f"first_{name}")
            kept = torch.where(full, first, stored[:, :, : self.sinks])
            setattr(self, name, torch.cat([kept, stored[:, :, self.sinks :]], dim=2))

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None) -> None:
        """Empty the rows where ``mask`` (B,) is True, or all rows."""
        super().reset(mask)
        if mask is None:
            self.read = torch.zeros_like(self.read)
        else:
            self.read = self.read.masked_fill(mask.to(self.read.device), 0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the cache, by name; the first dimension is the row."""
        own = {name: getattr(self, name) for name in ("first_keys", "first_values", "read")}
        return {**super().tensors(), **own}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave; a smaller cache keeps the first and the newest pairs."""
        super().load(tensors)
        self.sinks = min(self.sinks, tensors["first_keys"].shape[2])
        for name in ("first_keys", "first_values"):
            found = tensors[name][:, :, : self.sinks]
            setattr(self, name, found.to(getattr(self, name)).clone())
        self.read = tensors["read"].to(self.read).clone()
        self._keep_first()
