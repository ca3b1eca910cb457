"""Causal self-attention over a segment, its XL cache and, in a memory layer, retrieved pairs.

Shapes: B rows, N segment, W cached tokens, S = W + N keys, H query heads, G key/value heads,
R = H / G query heads a key/value head, D head width, K neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import Memory, Pairs, Search, XLCache
from .bias import LocalBias
from .compiled import compilable
from .config import ModelConfig
from .flex import FEWEST_QUERIES, flex_local_attention, flex_works
from .local_attention import local_attention
from .opaque_attention import opaque_local_attention
from .reader import MemoryReader, Retrieval

MASK_BYTES = 2**26
"""Largest mask (B, H, N, S) of a layer; a larger one would be kept for the backward pass, so
attention then goes in blocks. Only where FlexAttention does not work."""


def normalize(x: Tensor) -> Tensor:
    """Unit length over the last dimension, in fp32: ``x * rsqrt(sum(x^2) + 1e-6)``."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Multi-head attention with T5 bias, QK normalisation, grouped heads and an XL cache.

    Args:
        config: the model.
        first: whether it is layer 0, whose values ``value_residual`` mixes into the others'.
    """

    def __init__(self, config: ModelConfig, first: bool = False) -> None:
        super().__init__()
        self.compile_dense = config.compile
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.head_width
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(config.d_model, kv_width, bias=False)
        self.value = nn.Linear(config.d_model, kv_width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)
        self.bias = LocalBias(self.num_heads, config.relative_buckets, config.relative_max_distance)
        self.scale: nn.Parameter | None = None
        if config.qk_norm:
            self.scale = nn.Parameter(torch.full((self.num_heads,), config.qk_scale_init))
        self.value_share: nn.Parameter | None = None
        if config.value_residual and not first:
            self.value_share = nn.Parameter(torch.full((1,), 0.5))

    @compilable
    def project(self, x: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, D), scaled, and keys and values (B, G, N, D) of hidden states x.

        Args:
            x: (B, N, d_model).
            first_values: (B, G, N, D) layer 0's values; only ``value_residual`` reads them.
        """
        q = self.query(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if self.value_share is not None and first_values is not None:
            v = torch.lerp(v, first_values, self.value_share.to(v.dtype))
        if self.scale is None:
            return q * self.head_dim**-0.5, k, v
        return normalize(q) * self.scale.abs()[:, None, None], normalize(k), v

    def local(
        self, q: Tensor, k: Tensor, v: Tensor, cache: XLCache | None, with_mass: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the cache and causally to the segment.

        Args:
            q: (B, H, N, D) scaled queries.
            k: (B, G, N, D) keys.
            v: (B, G, N, D) values.
            cache: the layer's XL cache, or None.
            with_mass: also return the log of the summed exponentials of the scores.

        Returns:
            output (B, H, N, D) and log mass (B, H, N) fp32 or None.
        """
        if cache is not None and cache.size:
            k = torch.cat([cache.keys.to(k.dtype), k], dim=2)
            v = torch.cat([cache.values.to(v.dtype), v], dim=2)
        seen = cache.valid() if cache is not None and cache.size else None
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        flexible = q.is_cuda and q.shape[2] >= FEWEST_QUERIES
        # Its backward pass adds up the gradient of the biases in any order.
        flexible = flexible and not torch.are_deterministic_algorithms_enabled()
        # In a graph it cannot be tried; where it fails, the graph does, and the parts run.
        in_graph = torch.compiler.is_compiling()
        flexible = flexible and (in_graph or flex_works(q.device, v.dtype, *heads))
        mask_bytes = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * v.element_size()
        if q.is_cuda and not (with_mass or flexible or mask_bytes > MASK_BYTES):
            return self.fused(q, k, v, seen), None
        near, far = self.bias.near(k.shape[2])
        asks = not (q.is_cuda or in_graph)  # else it would wait, or break the graph
        hidden = None if seen is None or (asks and bool(seen.all())) else ~seen
        attend: Any = opaque_local_attention if in_graph else local_attention
        attend = flex_local_attention if flexible else attend
        output, mass = attend(q, k, v, near, hidden, with_mass)
        return output, mass if mass is None else mass + far[:, None]

    @compilable
    def fused(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """What ``local_attention`` does, by the device's own kernel.

        Args:
            q: (B, H, N, D) scaled queries.
            k: (B, G, S, D) keys.
            v: (B, G, S, D) values.
            seen: (B, W) bool, which cached places count, or None for all.
        """
        segment = q.shape[2]
        allowed = torch.ones(segment, segment, dtype=torch.bool, device=q.device).tril()
        if seen is not None:
            past = seen[:, None, None, :].expand(-1, 1, segment, -1)
            allowed = torch.cat([past, allowed.expand(past.shape[0], 1, -1, -1)], dim=-1)
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        mask = self.bias(segment, k.shape[2]).masked_fill(~allowed, -torch.inf)
        mask = mask.to(v.dtype).expand(q.shape[0], -1, -1, -1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    def merge(self, heads: Tensor) -> Tensor:
        """Project the heads' outputs (B, H, N, D) to (B, N, d_model)."""
        return self.output(heads.transpose(1, 2).flatten(-2))

    def forward(
        self,
        x: Tensor,
        cache: XLCache | None = None,
        memory: Memory | None = None,
        input_ids: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Pairs, Retrieval | None]:
        """Attend; reads ``cache`` and changes nothing.

        Returns:
            the output (B, N, d_model), the segment's pairs with their gradients, and no retrieval.
        """
        q, k, v = self.project(x, first_values)
        heads, _ = self.local(q, k, v, cache)
        return self.merge(heads), (k, v), None


class MemoryLayerAttention(Attention):
    """Attention that also reaches the row's memory, with the same queries.

    Args:
        config: the model.
        search: how neighbours are found.
        first: whether it is layer 0.
    """

    def __init__(self, config: ModelConfig, search: Search, first: bool = False) -> None:
        super().__init__(config, first)
        self.reader = MemoryReader(
            self.num_heads, self.num_kv_heads, config.d_model, config.memory, search
        )

    def forward(
        self,
        x: Tensor,
        cache: XLCache | None = None,
        memory: Memory | None = None,
        input_ids: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Pairs, Retrieval | None]:
        """Attend; reads ``cache`` and ``memory`` and changes nothing."""
        if memory is None:
            return super().forward(x, cache, first_values=first_values)
        q, k, v = self.project(x, first_values)
        # Towards a memory on the host this copy waits for the projections alone: local attention,
        # enqueued after it, runs on the GPU while the host searches.
        asked = q.to(memory.device)
        local, mass = self.local(q, k, v, cache, with_mass=self.reader.gate.needs_local_mass)
        heads, retrieval = self.reader(asked, local, mass, x, memory, input_ids)
        return self.merge(heads.to(v.dtype)), (k, v), retrieval
