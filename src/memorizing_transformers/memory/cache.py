"""The Transformer-XL cache of one layer: keys and values of the last W tokens of each row.

Shapes: B rows, G key/value heads, W cached tokens, N tokens of a segment, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .loading import check_loadable
from .rows import RowStore


class XLCache(RowStore):
    """The last W pairs of each row, newest at the right; empty places are masked, never attended.

    Tensors are replaced and never changed, so ``copy.copy`` is a snapshot.

    Args:
        batch_size: rows B.
        num_kv_heads: key/value heads G.
        size: tokens W kept per row.
        head_dim: width D.
        dtype: storage dtype.
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
        shape = (batch_size, num_kv_heads, size, head_dim)
        self.size = size
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,) cached tokens in use: the rightmost ``length`` places."""

    def valid(self) -> Tensor:
        """(B, W) bool: which places hold a pair."""
        index = torch.arange(self.size, device=self.length.device)
        return index >= self.size - self.length[:, None]

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Shift a segment in: keys and values (B, G, N, D), padding only at the right of ``mask``.

        Args:
            keys: (B, G, N, D).
            values: (B, G, N, D).
            mask: (B, N) bool, True at real tokens, on any device, or None for all.
        """
        count = torch.full_like(self.length, keys.shape[2])
        counts: list[int] | None = [keys.shape[2]] * keys.shape[0]
        if mask is not None:
            count = mask.sum(1).to(self.length)
            # To ask another device how many tokens its mask holds would wait for it.
            counts = count.tolist() if mask.device.type == "cpu" else None
        for name, new in (("keys", keys), ("values", values)):
            old, new = getattr(self, name), new.detach()
            shifted = _gathered(old, new, count) if counts is None else _copied(old, new, counts)
            setattr(self, name, shifted)
        self.length = (self.length + count).clamp(max=self.size)

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None) -> None:
        """Empty the rows where ``mask`` (B,) is True, or all rows."""
        if mask is None:
            self.length = torch.zeros_like(self.length)
        else:
            self.length = self.length.masked_fill(mask.to(self.length.device), 0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the cache, by name; the first dimension is the row."""
        return {"keys": self.keys, "values": self.values, "length": self.length}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave; a smaller cache keeps the newest tokens.

        Raises:
            ValueError: where ``tensors`` are of other rows, heads or widths; nothing is written.
        """
        check_loadable(tensors, self.tensors(), "cache")
        old_size = tensors["keys"].shape[2]
        kept = min(self.size, old_size)
        for name in ("keys", "values"):
            own = torch.zeros_like(getattr(self, name))
            own[:, :, self.size - kept :] = tensors[name][:, :, old_size - kept :].to(own)
            setattr(self, name, own)
        self.length = tensors["length"].to(self.length).clamp(max=self.size)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def _copied(old: Tensor, new: Tensor, counts: Sequence[int]) -> Tensor:
    """The last W pairs of each row: (B, G, W, D) of old (B, G, W, D) and new (B, G, N, D).

    Args:
        old: the cache.
        new: a segment.
        counts: by row, tokens of the segment that are real. Neighbouring rows with as many are
            copied at once.
    """
    made, size = torch.empty_like(old), old.shape[2]
    first = 0
    for count, alike in groupby(counts):
        rows = slice(first, first + len([*alike]))
        first, taken = rows.stop, min(count, size)
        made[rows, :, : size - taken] = old[rows, :, taken:]
        made[rows, :, size - taken :] = new[rows, :, count - taken : count]
    return made


def _gathered(old: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    """What ``_copied`` makes, for counts (B,) that are on the cache's device; waits for nothing."""
    index = counts[:, None] + torch.arange(old.shape[2], device=old.device)
    index = index[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    return torch.cat([old, new.to(old.dtype)], dim=2).gather(2, index)
