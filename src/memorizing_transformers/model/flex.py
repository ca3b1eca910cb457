"""Local attention by torch's FlexAttention: one fused kernel, and no mask or bias in memory.

Shapes: as in ``local_attention``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

logger = logging.getLogger(__name__)

FEWEST_QUERIES = 128
"""With fewer, as in generation, each token would bring a mask and a kernel of another shape."""

ScoreChange = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""The score of row b, head h, query i and key j, changed."""


def score_change(near: Tensor, cached: int, hidden: Tensor | None) -> ScoreChange:
    """Adds the bias by distance, and minus infinity to cached keys that a row may not see.

    Args:
        near: (H, F) bias at distances 0 to F - 1; beyond, it is 0.
        cached: keys W that lie before the segment.
        hidden: (B, W) bool, cached places that no query may see, or None.
    """
    distances = near.shape[1]
    table = torch.cat([near, near.new_zeros(near.shape[0], 1)], 1)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + table[h, (i + cached - j).clamp(0, distances)]
        if hidden is None:
            return score
        unseen = (j < cached) & hidden[b, j.clamp(max=cached - 1)]
        return torch.where(unseen, -torch.inf, score)

    return change


@lru_cache(maxsize=64)
def causal_blocks(queries: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks of keys the last ``queries`` of ``keys`` tokens see at all."""
    cached = keys - queries

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + cached

    return create_block_mask(seen, None, None, queries, keys, device=str(device))


def flex_local_attention(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, hidden: Tensor | None, with_mass: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What ``local_attention`` does: same arguments, same results.

    On a CPU it runs without compiling and has no backward pass.
    """
    queries, keys = q.shape[2], k.shape[2]
    # The compiler would make a kernel for each layer if a bias were a parameter of the module.
    change = score_change(near.float(), keys - queries, hidden)
    attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
    with torch.autocast(q.device.type, enabled=False):
        output, extra = attend(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            score_mod=change,
            block_mask=causal_blocks(queries, keys, q.device),
            scale=1.0,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=with_mass),
        )
    return output, extra.lse if with_mass else None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@cache
def flex_works(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> bool:
    """Whether this device can run it for such heads, forwards and backwards; tried once.

    The log says why not.
    """
    if device.type != "cuda":
        return False
    made: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            q = torch.randn(1, heads, 128, width, **made)
            k, v = (torch.randn(1, kv_heads, 256, width, **made) for _ in range(2))
            near = torch.zeros(heads, 32, device=device, requires_grad=True)
            hidden = torch.zeros(1, 128, dtype=torch.bool, device=device)
            output, mass = flex_local_attention(q, k, v, near, hidden, with_mass=True)
            assert mass is not None
            torch.autograd.grad(output.float().sum() + mass.sum(), (q, k, v, near))
    except Exception as error:  # of the compiler, of the driver, of a kernel that has no room
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("local attention without FlexAttention, which failed here: %s", first)
        return False
    return True
