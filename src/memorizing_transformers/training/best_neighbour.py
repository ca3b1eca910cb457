"""The one neighbour that matters most to each token.

Shapes: B rows, H query heads, N segment, K neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import Memory
from ..model import Retrieval


class BestNeighbour(NamedTuple):
    """By token of a segment, what a memory layer took most from; -1 where nothing was retrieved."""

    share: Tensor
    """(B, N) share of the memory in the layer's output, mean over the heads."""
    head: Tensor
    """(B, N) the head that retrieved it."""
    slot: Tensor
    """(B, N) where it lies in the row's ring."""
    neighbour: Tensor
    """(B, N) the position in the document of its token."""
    distance: Tensor
    """(B, N) tokens from it to the token that retrieved it."""
    weight: Tensor
    """(B, N) its part of that head's output, in [0, 1]: share of the memory times its softmax
    weight; 0 where nothing was retrieved."""


def best_neighbour(memory: Memory, retrieval: Retrieval) -> BestNeighbour:
    """Of all neighbours of all heads the one with the largest part of its head's output.

    Must run before the segment is committed, while the slots still hold what was retrieved.
    """
    batch, _, segment, top_k = retrieval.slots.shape
    part = retrieval.parts().masked_fill(~retrieval.valid, -1.0).transpose(1, 2).flatten(2)
    weight, which = part.max(-1)
    slot = retrieval.slots.transpose(1, 2).flatten(2).gather(-1, which[..., None])[..., 0]
    found = weight >= 0
    slot = slot.masked_fill(~found, 0)
    row = torch.arange(batch, device=slot.device)[:, None]
    neighbour = memory.positions[row, slot].long()
    here = memory.written[:, None] + torch.arange(segment, device=slot.device)
    return BestNeighbour(
        retrieval.share.mean(1).to(slot.device),
        (which // top_k).masked_fill(~found, -1),
        slot.masked_fill(~found, -1),
        neighbour.masked_fill(~found, -1),
        (here - neighbour).masked_fill(~found, -1),
        weight.clamp(min=0.0),
    )
