"""Metrics over counted tokens, from fp32 sums of negative log-likelihood accumulated in fp64.

The stock perplexity takes its softmax in the input's dtype and the logarithm after it, which
rounds; here the loss is ``log_softmax`` in fp32 and only sums are kept, so the figure is the same
for any number of rows, batches and ranks, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from ..data.batch import fp64_device, in_fp64


class TokenRatio(Metric):
    """A sum over a sum, added up over batches and ranks in fp64.

    The sums follow the module to its device, but never to its dtype: a sum in bf16 takes no further
    1 from 256 on. Where the device has no fp64 they stay on the CPU.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "weight"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fp64_device(fn(torch.empty(0, device=tensor.device)).device))

        moved: nn.Module = super()._apply(move, exclude_state)
        return moved

    def add(self, total: Tensor, weight: Tensor) -> None:
        """Add a batch's sums, both scalars of any dtype."""
        self.total += in_fp64(total).to(self.total.device)
        self.weight += in_fp64(weight).to(self.weight.device)

    def ratio(self) -> Tensor:
        """Sum over sum; NaN while nothing was counted."""
        return self.total / self.weight


class Loss(TokenRatio):
    """Mean negative log-likelihood per counted token, in nats."""

    def update(self, nll: Tensor, correct: Tensor, mask: Tensor, num_bytes: Tensor) -> None:
        """Add a batch: nll, correct and mask (B, N), num_bytes (B,)."""
        self.add(in_fp64(nll).sum(), mask.sum())

    def compute(self) -> Tensor:
        """Nats per token."""
        return self.ratio().float()


class Perplexity(Loss):
    """The exponential of the mean negative log-likelihood per counted token."""

    def compute(self) -> Tensor:
        """Perplexity per token."""
        return self.ratio().exp().float()


class BitsPerByte(TokenRatio):
    """Bits of negative log-likelihood per UTF-8 byte of text: comparable over tokenizers."""

    def update(self, nll: Tensor, correct: Tensor, mask: Tensor, num_bytes: Tensor) -> None:
        """Add a batch: nll, correct and mask (B, N), num_bytes (B,)."""
        self.add(in_fp64(nll).sum() / math.log(2), num_bytes.sum())

    def compute(self) -> Tensor:
        """Bits per byte."""
        return self.ratio().float()


class Accuracy(TokenRatio):
    """Share of counted tokens that the most likely prediction hits."""

    def update(self, nll: Tensor, correct: Tensor, mask: Tensor, num_bytes: Tensor) -> None:
        """Add a batch: nll, correct and mask (B, N), num_bytes (B,)."""
        self.add((correct & mask).sum(), mask.sum())

    def compute(self) -> Tensor:
        """Next-token accuracy in [0, 1]."""
        return self.ratio().float()


def language_model_metrics(prefix: str) -> MetricCollection:
    """``loss``, ``perplexity``, ``bits_per_byte`` and ``accuracy`` under ``prefix``."""
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": Loss(),
        "perplexity": Perplexity(),
        "bits_per_byte": BitsPerByte(),
        "accuracy": Accuracy(),
    }
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
