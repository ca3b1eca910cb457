"""How keys and values are stored: in fp32, in bfloat16, or in int8 with a scale for each vector.

An int8 vector stands for ``scale * integers`` with ``scale = max|x| / 127``. A number is off by
half a step at most, 0.4 % of the vector's largest number; bfloat16 loses 0.2 % of each number.

Shapes: B rows, G key/value heads, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STORAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""What keys and values may be stored in."""
SCALES = {"keys": "key_scales", "values": "value_scales"}
"""The names of the scales (B, G, M) fp32 of int8 tensors (B, G, M, D)."""
BOOKKEEPING = 8
"""Bytes a slot needs in addition to its pair: token and step."""
_LEVELS = 127


def slot_bytes(dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one slot: a pair of every head, its scales if it has some, and bookkeeping."""
    scale = 4 if dtype == torch.int8 else 0
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + scale) + BOOKKEEPING


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (..., D) int8 and scales (...) fp32 of vectors x (..., D).

    What is not finite stays so: its scale is not finite either.
    """
    x = x.float()
    scales = x.abs().amax(-1) / _LEVELS
    steps = x / scales.masked_fill(scales == 0, 1.0)[..., None]
    return steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scales


def restore(
    stored: Tensor, scales: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Stored vectors (..., D) in a floating dtype; a view where there is nothing to convert.

    Args:
        stored: in a storage dtype.
        scales: (...) where stored as int8.
        dtype: of the result.
    """
    return stored.to(dtype) if scales is None else stored.to(dtype).mul_(scales[..., None])


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``Memory.tensors`` gave, as a memory with another storage dtype would hold it.

    Pairs that are stored so already are left as they are, to the bit.
    """
    made = dict(tensors)
    for name, scales in SCALES.items():
        if made[name].dtype == dtype:
            continue
        made[name] = restore(made[name], made.pop(scales, None))
        if dtype == torch.int8:
            made[name], made[scales] = quantize(made[name])
    return made
