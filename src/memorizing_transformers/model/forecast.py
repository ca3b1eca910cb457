"""The loss from hidden states, some tokens at a time, so that logits of all never exist at once.

Of every token the logits are needed only for a few numbers: the log-probability of its target, of
some candidates, and the likeliest token. The backward pass computes the logits again, unless all
fit into one chunk. ``torch.nn.functional.linear_cross_entropy`` does this for targets alone: it has
no candidates, no hits and no soft cap, gives the loss in the dtype of the weights, and on a CPU
took two to three times as long.

Shapes: T tokens, C candidates, V vocabulary, d width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""The target of a token that does not count."""

CHUNK = 2**26
"""Logits that exist at once: 256 MiB in fp32."""


class Forecast(NamedTuple):
    """What a model predicts after each token, all in fp32; only ``nll`` has a gradient."""

    nll: Tensor
    """(...) negative log-likelihood of the target; 0 where it does not count."""
    best: Tensor
    """(...) int64 likeliest token."""
    best_log_p: Tensor
    """(...) its log-probability."""
    log_p: Tensor | None
    """(..., C) log-probabilities of the candidates; None without any."""


def forecast(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    candidates: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
    run: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Forecast:
    """What ``softmax(soft_cap(hidden @ weight.T + bias))`` says of targets and candidates.

    Under autocast the product is of its dtype; logits, softmax and sums are in fp32. Only a CUDA
    device gives a product of half precision without rounding it, other devices round the logits.

    Args:
        hidden: (..., d).
        weight: (V, d).
        targets: (...) int64, -100 for tokens that do not count.
        candidates: (..., C) int64.
        bias: (V,).
        cap: bounds logits x to ``cap * tanh(x / cap)`` (Gemma 2, 2024, section 2); None does not.
        run: what computes it of flat tensors; None for this file's function of autograd.
    """
    kind, shape = hidden.device.type, targets.shape
    dtype = hidden.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    flat = None if candidates is None else candidates.flatten(0, -2)
    with torch.autocast(kind, enabled=False):
        nll, best, best_log_p, log_p = (run or run_forecast)(
            hidden.flatten(0, -2).to(dtype), weight, bias, targets.flatten(), flat, cap
        )
    if candidates is not None:
        log_p = log_p.view(candidates.shape)
    return Forecast(nll.view(shape), best.view(shape), best_log_p.view(shape), log_p)


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Tokens whose logits exist at once: chunks of nearly one size."""
    count = -(-tokens // max(1, CHUNK // vocab_size))
    return -(-tokens // max(1, count))


def loss_bytes(tokens: int, vocab_size: int, width: int, itemsize: int = 4) -> int:
    """Most bytes that ``forecast`` and its backward pass need at once, without gradients.

    Args:
        tokens: T.
        vocab_size: V.
        width: d.
        itemsize: bytes of a number of the product.
    """
    logits = chunk_tokens(tokens, vocab_size) * vocab_size
    # Logits and their softmax; in half precision a gradient and the weights are copied too.
    return 2 * logits * 4 + (itemsize < 4) * (logits + vocab_size * width) * itemsize


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in at least fp32; a GPU that can does not round it to their dtype before."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != wide and a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 0):
        exact: Tensor = torch.mm(a, b, out_dtype=wide)
        return exact
    return (a @ b).to(wide)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """(T, V) at least in fp32."""
    logits = _product(hidden, weight.t())
    if bias is not None:
        logits += bias
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class _Forecast(torch.autograd.Function):
    """``forecast`` of flat tensors; its gradient is that of the loss alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        candidates: Tensor | None,
        cap: float | None,
    ) -> tuple[Tensor | None, ...]:
        size = chunk_tokens(len(targets), len(weight))
        made, kept = foreseen(hidden, weight, bias, targets, candidates, cap, size)
        ctx.save_for_backward(hidden, weight, bias, targets, kept)
        ctx.size, ctx.cap = size, cap
        ctx.mark_non_differentiable(*made[1:])
        return made if candidates is not None else (*made, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        known, needed = (hidden, weight, bias, targets), ctx.needs_input_grad[:3]
        return *loss_gradients(*known, kept, ctx.cap, ctx.size, grads[0], needed), None, None, None


run_forecast: Any = _Forecast.apply
"""``forecast`` of flat tensors."""


def foreseen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    candidates: Tensor | None,
    cap: float | None,
    size: int,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The numbers of a ``Forecast`` (T,), without a graph, and the logarithms (T, V) of all
    probabilities where they may serve the backward pass.

    Args:
        hidden: (T, d).
        weight: (V, d).
        bias: (V,) or None.
        targets: (T,).
        candidates: (T, C) or None.
        cap: as in ``forecast``.
        size: tokens of a chunk.
    """
    cast, known = weight.to(hidden.dtype), targets.clamp(min=0)[:, None]
    # The derivative of a soft cap needs logits, which are not kept.
    kept, keeps = None, size == len(targets) and cap is None
    columns: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        log_p = _logits(hidden[part], cast, bias, cap).log_softmax(-1)
        best_log_p, best = log_p.max(-1)
        found = [-log_p.gather(-1, known[part])[:, 0], best, best_log_p]
        if candidates is not None:
            found.append(log_p.gather(-1, candidates[part]))
        for column, one in zip(columns, found, strict=False):
            column.append(one)
        kept = log_p if keeps else None
        del log_p  # else the next chunk's would be a third
    nll, *others = (torch.cat(column) for column in columns if column)
    return (nll.masked_fill_(targets == IGNORE_INDEX, 0.0), *others), kept


def loss_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: Tensor | None,
    cap: float | None,
    size: int,
    grad_nll: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, each None where it is not ``needed``.

    Args:
        hidden: as all that is not named here, what ``foreseen`` got.
        weight: (V, d).
        bias: (V,) or None.
        targets: (T,).
        kept: what ``foreseen`` kept, or None.
        cap: as in ``forecast``.
        size: tokens of a chunk.
        grad_nll: (T,).
        needed: of hidden, weight and bias.
    """
    to_hidden, to_weight, to_bias = needed
    cast, known = weight.to(hidden.dtype), targets.clamp(min=0)[:, None]
    scale = grad_nll.masked_fill(targets == IGNORE_INDEX, 0.0)[:, None]
    for_hidden = torch.empty_like(hidden) if to_hidden else None
    for_weight = torch.zeros_like(weight, dtype=scale.dtype) if to_weight else None
    for_bias = None
    if to_bias and bias is not None:
        for_bias = torch.zeros_like(bias, dtype=scale.dtype)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = _logits(hidden[part], cast, bias, cap) if kept is None else kept
        grad = logits.softmax(-1) if kept is None else kept.exp()
        grad.mul_(scale[part]).scatter_add_(-1, known[part], -scale[part])
        if cap is not None:
            grad.mul_(logits.div_(cap).square_().neg_().add_(1))
        del logits
        narrow = grad.to(hidden.dtype)
        if for_hidden is not None:
            torch.mm(narrow, cast, out=for_hidden[part])
        if for_weight is not None and narrow.dtype == for_weight.dtype:
            torch.addmm(for_weight, narrow.t(), hidden[part], out=for_weight)
        elif for_weight is not None:
            for_weight += _product(narrow.t(), hidden[part])
        if for_bias is not None:
            for_bias += grad.sum(0)
        del grad, narrow
    for_weight = None if for_weight is None else for_weight.to(weight.dtype)
    for_bias = None if for_bias is None or bias is None else for_bias.to(bias.dtype)
    return for_hidden, for_weight, for_bias
