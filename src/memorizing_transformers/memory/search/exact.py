"""Exact search: every slot scored in fp32, in bounded memory.

Exact over the keys as they are stored: what bfloat16 or int8 lost of a key when it was written is
lost to every search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..view import Readable
from .kernels.cpu_scan import SCORE_BYTES as HOST_SCORE_BYTES
from .kernels.cpu_scan import HostScan
from .kernels.score_blocks import SCORE_BYTES, score_blocks
from .kernels.top_k import largest
from .protocol import Neighbours


class ExactSearch:
    """The true neighbours.

    Args:
        score_bytes: bytes of scores that may live at once; None for what suits the device.
    """

    def __init__(self, score_bytes: int | None = None) -> None:
        self.score_bytes = score_bytes

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        if queries.device.type == "cpu":
            room = self.score_bytes or HOST_SCORE_BYTES
            return HostScan(None, torch.float32, room)(queries, memory, top_k)
        return self._on_device(queries, memory, top_k)

    def _on_device(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        """Block by block, the best so far merged with each block's best."""
        batch, groups, count, _ = queries.shape
        shape = (batch, groups, count, top_k)
        best = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        for rows, start, scores in score_blocks(queries, memory, self.score_bytes or SCORE_BYTES):
            values, index = largest(scores, min(top_k, scores.shape[-1]))
            index = index + start
            if start > 0:
                values = torch.cat([best[rows], values], dim=-1)
                index = torch.cat([slots[rows], index], dim=-1)
                values, order = values.topk(top_k, dim=-1)
                index = index.gather(-1, order)
            best[rows, :, :, : values.shape[-1]] = values
            slots[rows, :, :, : values.shape[-1]] = index
        return Neighbours(slots=slots, valid=best > -torch.inf)
