"""One layer: pre-norm attention and feed-forward.

Shapes: B rows, N segment, G key/value heads, D head width.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..memory import Memory, Pairs, XLCache
from .attention import Attention
from .compiled import compilable
from .config import ModelConfig
from .reader import Retrieval

First = tuple[Tensor, Tensor]
"""Of layer 0: its input (B, N, d_model), which is the embedding, and its values (B, G, N, D)."""


class ReLU2(nn.Module):
    """The square of the positive part."""

    def forward(self, x: Tensor) -> Tensor:
        """``max(x, 0)^2``, elementwise."""
        return F.relu(x).square()


class Layer(nn.Module):
    """Pre-norm attention and feed-forward.

    Args:
        config: the model.
        attention: the layer's attention.
        first: whether it is layer 0, which has no shortcut from the embedding.
    """

    def __init__(self, config: ModelConfig, attention: Attention, first: bool) -> None:
        super().__init__()
        self.shortcut: nn.Parameter | None = None
        if config.embedding_shortcut and not first:
            self.shortcut = nn.Parameter(torch.zeros(1))
        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.attention = attention
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(config.d_model, eps=1e-6),
            nn.Linear(config.d_model, config.ff_width, bias=False),
            ReLU2() if config.activation == "relu2" else nn.ReLU(),
            nn.Linear(config.ff_width, config.d_model, bias=False),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = config.activation_checkpointing
        self.compile_dense = config.compile

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the last linear maps, so that the layer adds nothing to its input."""
        for linear in (self.attention.output, self.feed_forward[-1]):
            assert isinstance(linear, nn.Linear)
            linear.weight.zero_()

    def forward(
        self,
        x: Tensor,
        cache: XLCache | None,
        memory: Memory | None,
        input_ids: Tensor | None = None,
        first: First | None = None,
    ) -> tuple[Tensor, Pairs, Retrieval | None]:
        """One layer on hidden states x (B, N, d_model).

        Args:
            x: the output of the layer before.
            cache: the layer's XL cache, or None.
            memory: the layer's memory, or None.
            input_ids: the tokens up to these N, which are the last.
            first: what layer 0 read and made; None for layer 0.
        """
        x, first_values = self._with_shortcut(x, first)
        recompute = self.recompute and torch.is_grad_enabled()
        attend = self._attend
        if recompute and memory is None:
            # The backward pass recomputes after the commit: a copy still holds what was read.
            read = cache if torch.compiler.is_compiling() else copy(cache)
            arguments = (x, read, memory, input_ids, first_values)
            attended, pairs, retrieval = checkpoint(attend, *arguments, use_reentrant=False)
        else:
            # A search takes long and its result is small: keep it instead of searching twice.
            attended, pairs, retrieval = attend(x, cache, memory, input_ids, first_values)
        x = x + self.dropout(attended)
        fed = checkpoint(self.feed, x, use_reentrant=False) if recompute else self.feed(x)
        return x + self.dropout(fed), pairs, retrieval

    @compilable
    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward part on hidden states x (B, N, d_model)."""
        fed: Tensor = self.feed_forward(x)
        return fed

    def pairs(self, x: Tensor, first: First | None) -> Pairs:
        """Keys and values (B, G, N, D) of the hidden states that ``forward`` would get."""
        x, first_values = self._with_shortcut(x, first)
        _, k, v = self.attention.project(self.attention_norm(x), first_values)
        return k.detach(), v.detach()

    def _with_shortcut(self, x: Tensor, first: First | None) -> tuple[Tensor, Tensor | None]:
        if first is None:
            return x, None
        embedded, values = first
        if self.shortcut is not None:
            x = x + self.shortcut * embedded
        return x, values

    def _attend(
        self,
        x: Tensor,
        cache: XLCache | None,
        memory: Memory | None,
        input_ids: Tensor | None,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Pairs, Retrieval | None]:
        return self.attention(self.attention_norm(x), cache, memory, input_ids, first_values)
