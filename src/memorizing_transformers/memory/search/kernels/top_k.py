"""The k largest numbers of each row and where they are: exact, and fast where rows are wide.

The k largest numbers lie in the k buckets with the largest maxima. So: a maximum over small
buckets, the k largest of those (the same way), then the k largest among the members of the chosen
buckets. Scores are read once, and no wide row is sorted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 256
"""Up to this width a row is sorted directly, and so are the members of the chosen buckets."""
MOST_MEMBERS = 32
"""Members of a bucket at most."""
SORT_WIDTH = 512
"""Up to this width numpy sorts a complete row faster than torch sorts a part of it."""
FEW_THREADS = 4
"""numpy's vectorised sort runs on one thread, three to five times as fast as one of torch's."""
_HUGE = 2.0**600
_INDEX_BITS = 29


def members_for(top_k: int) -> int:
    """Members of a bucket, so that the members of ``top_k`` buckets still are a narrow row."""
    return min(MOST_MEMBERS, max(1, NARROW // top_k))


def _sort_packed(scores: Tensor, top_k: int) -> Tensor:
    """Positions (n, k) of the k largest of fp32 or bf16 scores (n, w), best first.

    A number in fp32 leaves the last 29 bits of an fp64 empty: the position travels in them, and
    one sort of plain numbers orders both.
    """
    packed = scores.double().clamp_(-_HUGE, _HUGE)
    bits = packed.view(torch.int64)
    bits |= torch.arange(scores.shape[-1])
    packed.numpy().sort(axis=-1)
    return bits[:, -top_k:].flip(-1) & ((1 << _INDEX_BITS) - 1)


def _narrow(scores: Tensor, top_k: int) -> Tensor:
    wide = scores.shape[-1] > SORT_WIDTH
    if wide or scores.device.type != "cpu" or torch.get_num_threads() > FEW_THREADS:
        return scores.topk(top_k, dim=-1).indices
    return _sort_packed(scores.reshape(-1, scores.shape[-1]), top_k).view(*scores.shape[:-1], top_k)


def largest(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same as ``scores.topk(top_k)`` over the last dimension, ties aside.

    Args:
        scores: (..., M) fp32 or bf16, minus infinity included.
        top_k: at most M.

    Returns:
        values and int64 indices, each (..., top_k), best first.
    """
    width = scores.shape[-1]
    members = members_for(top_k)
    if width <= NARROW or members < 2:
        indices = _narrow(scores, top_k)
        return scores.gather(-1, indices), indices
    ragged = -width % members
    folded = F.pad(scores, (0, ragged), value=-torch.inf) if ragged else scores
    stride = folded.shape[-1] // members
    _, chosen = largest(folded.unflatten(-1, (members, stride)).amax(dim=-2), top_k)
    return largest_in_buckets(folded, chosen, stride, members, top_k)


def largest_in_buckets(
    scores: Tensor, first: Tensor, stride: int, members: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """The k largest members of chosen buckets.

    Args:
        scores: (..., M).
        first: (..., C) where the first member of each chosen bucket is.
        stride: from one member to the next.
        members: members of a bucket.
        top_k: at most C * members.
    """
    steps = torch.arange(members, device=scores.device) * stride
    candidates = (first[..., None] + steps).flatten(-2)
    values = scores.gather(-1, candidates)
    order = _narrow(values, top_k)
    return values.gather(-1, order), candidates.gather(-1, order)
