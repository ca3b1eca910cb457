"""``local_attention`` as one op of a compiled graph: the compiler does not look into its loops.

Shapes: as in ``local_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .local_attention import BLOCK, attended, bias_band, gradients, like_heads


def opaque_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Tensor,
    hidden: Tensor | None = None,
    with_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``local_attention`` does: same arguments, same results."""
    with torch.autocast(q.device.type, enabled=False):
        band = bias_band(near.float(), min(BLOCK, q.shape[2]))
        output, mass = _forward(q.float(), k.float(), v, band, hidden, with_mass)
    return output, mass if with_mass else None


def _needed(hidden: Tensor | None) -> Tensor | None:
    """None where nothing is hidden; to ask a GPU would wait."""
    asks = hidden is not None and hidden.device.type == "cpu"
    return None if asks and hidden is not None and not hidden.any() else hidden


@custom_op(
    "memorizing_transformers::local_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor band, Tensor? hidden, bool with_mass)"
    " -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None, with_mass: bool
) -> tuple[Tensor, Tensor]:
    output, mass = attended(q, k, v, band, _needed(hidden), with_mass)
    return output, q.new_empty(0) if mass is None else mass


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None, with_mass: bool
) -> tuple[Tensor, Tensor]:
    return like_heads(q, v.dtype), q.new_empty(q.shape[:3] if with_mass else (0,))


@custom_op(
    "memorizing_transformers::local_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor band, Tensor? hidden, Tensor output,"
    " Tensor d_output, Tensor? d_mass) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    hidden: Tensor | None,
    output: Tensor,
    d_output: Tensor,
    d_mass: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return gradients(q, k, v, band, _needed(hidden), output, d_output, d_mass)


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    hidden: Tensor | None,
    output: Tensor,
    d_output: Tensor,
    d_mass: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_v = torch.zeros_like(k).to(v.dtype)
    return like_heads(q, torch.float32), torch.zeros_like(k), d_v, torch.zeros_like(band)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[0])
    ctx.with_mass = inputs[-1]


def _gradients(ctx: Any, d_output: Tensor, d_mass: Tensor) -> tuple[Tensor | None, ...]:
    made = _backward(*ctx.saved_tensors, d_output, d_mass if ctx.with_mass else None)
    return *made, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
