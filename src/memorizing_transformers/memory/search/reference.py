"""The slow and obvious search that all others are held against. Never optimise it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..view import Readable
from .protocol import Neighbours


def reference_search(queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
    """Score every slot in fp32, mask the empty ones, take the best ``top_k``."""
    scores = queries.float() @ memory.keys_at(...).transpose(-1, -2)
    scores = scores.masked_fill(~memory.valid()[:, None, None, :], -torch.inf)
    best = scores.topk(top_k, dim=-1)
    return Neighbours(slots=best.indices, valid=best.values > -torch.inf)
