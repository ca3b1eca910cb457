"""Local attention by torch's FlexAttention: one fused kernel, and no mask or bias in memory.

Shapes: as in ``local_attention``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from .compiled import compile_apart

logger = logging.getLogger(__name__)

FEWEST_QUERIES = 128
"""With fewer, as in generation, each token would bring a mask and a kernel of another shape."""

ScoreChange = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""The score of row b, head h, query i and key j, changed."""


def score_change(near: Tensor, cached: int, keys: int, hidden: Tensor | None) -> ScoreChange:
    """Adds the bias by distance, and minus infinity to cached keys that a row may not see.

    Args:
        near: (H, F) bias at distances 0 to F - 1; beyond, it is 0.
        cached: keys W that lie before the segment.
        keys: keys S in all.
        hidden: (B, W) bool, cached places that no query may see, or None.
    """
    # A column for each distance: the backward pass adds to the table one score after the other,
    # and all that are far away would wait for the same number.
    table = F.pad(near, (0, max(0, keys - near.shape[1])))
    last = table.shape[1] - 1

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + table[h, (i + cached - j).clamp(0, last)]
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

    # The mask is kept: one made in inference mode could not be saved for a backward pass.
    with torch.inference_mode(False):
        return create_block_mask(seen, None, None, queries, keys, device=str(device))


def flex_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Tensor,
    hidden: Tensor | None,
    with_mass: bool = False,
    trial: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``local_attention`` does: same arguments, same results.

    On a CPU it runs without compiling and has no backward pass. A trial has a kernel of its own.
    """
    queries, keys = q.shape[2], k.shape[2]
    # The compiler would make a kernel for each layer if a bias were a parameter of the module.
    change = score_change(near.float(), keys - queries, keys, hidden)
    attend: Any = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        attend = _kernel((q.device, q.dtype, *modes, with_mass, trial), (*q.shape, keys))
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


def _kernel(kind: tuple[Hashable, ...], shape: tuple[int, ...]) -> Any:
    """The compiled kernel of a kind: one for its first shape alone, another for all others.

    Training has one shape, and a kernel for any shape is slower. Each kind counts its own
    compilations, for torch gives up after a few.
    """
    known = _FIRST_SHAPES.setdefault(kind, shape)
    return _compiled(kind, shape == known)


_FIRST_SHAPES: dict[tuple[Hashable, ...], tuple[int, ...]] = {}


@cache
def _compiled(kind: tuple[Hashable, ...], one_shape: bool) -> Any:
    return compile_apart(flex_attention, dynamic=False if one_shape else None)


def flex_works(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> bool:
    """Whether this device can run it for such heads, forwards and backwards; tried once.

    The log says why not.
    """
    return flex_failure(device, dtype, heads, kv_heads, width) is None


@cache
def flex_failure(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> str | None:
    """Why this device cannot run it for such heads; None where it can."""
    if device.type != "cuda":
        return "not a CUDA device"
    made: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    try:
        # Hooks of its own: those of activation checkpointing would compute the layer again. No
        # random numbers: a resumed run would draw others than an unbroken one.
        own = saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), torch.inference_mode(False), own:
            q = torch.ones(1, heads, 128, width, **made)
            k, v = (torch.ones(1, kv_heads, 256, width, **made) for _ in range(2))
            near = torch.zeros(heads, 32, device=device, requires_grad=True)
            hidden = torch.zeros(1, 128, dtype=torch.bool, device=device)
            output, mass = flex_local_attention(q, k, v, near, hidden, True, trial=True)
            assert mass is not None
            torch.autograd.grad(output.float().sum() + mass.sum(), (q, k, v, near))
    except Exception as error:  # of the compiler, of the driver, of a kernel that has no room
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("local attention without FlexAttention, which failed here: %s", first)
        return first
    return None
