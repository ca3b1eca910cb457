"""The loss in chunks as one op of a compiled graph.

The compiler would see that the backward pass computes the same logits as the forward pass, and keep
those of all chunks.

Shapes: as in ``forecast``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .forecast import chunk_tokens, foreseen, loss_gradients, run_forecast


def run_in_graph(
    hidden: Tensor,
    weight: Tensor,
    bias: None,
    targets: Tensor,
    candidates: Tensor | None,
    cap: None,
) -> tuple[Tensor, ...]:
    """What ``forecast`` runs in a graph, without bias and cap; a single chunk is compiled."""
    size = chunk_tokens(len(targets), len(weight))
    if size == len(targets):
        made: tuple[Tensor, ...] = run_forecast(hidden, weight, bias, targets, candidates, cap)
        return made
    none = targets[:, None][:, :0]
    return _forward(hidden, weight, targets, none if candidates is None else candidates, size)


@custom_op(
    "memorizing_transformers::forecast",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor candidates, SymInt size)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, candidates: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made, _ = foreseen(hidden, weight, None, targets, candidates, None, size)
    nll, best, best_log_p, log_p = made
    return nll, best, best_log_p, log_p


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, candidates: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll, best_log_p = (hidden.new_empty(targets.shape, dtype=wide) for _ in range(2))
    log_p = hidden.new_empty(candidates.shape, dtype=wide)
    return nll, torch.empty_like(targets), best_log_p, log_p


@custom_op(
    "memorizing_transformers::forecast_backward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, SymInt size, Tensor grad)"
    " -> (Tensor, Tensor)",
)
def _backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, size: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    known = (hidden, weight, None, targets)
    for_hidden, for_weight, _ = loss_gradients(*known, None, None, size, grad, (True, True, False))
    assert for_hidden is not None
    assert for_weight is not None
    return for_hidden, for_weight


@_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, size: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, _, ctx.size = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    # Of the losses alone.
    return *_backward(*ctx.saved_tensors, ctx.size, grads[0]), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
