"""The reader: searches a memory, attends to what it found, and joins it with local attention.

It knows queries, hidden states and a memory, and no particular attention, so any attention can use
it.

Shapes: B rows, N segment, H query heads, G key/value heads, D head width, K neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..memory import MemoryAttention, Readable, Search, attend
from .bias import MemoryBias
from .config import MemoryConfig
from .gates import GATES


class Retrieval(NamedTuple):
    """What a memory layer retrieved for one segment, detached; on the device of the memory."""

    slots: Tensor
    """(B, H, N, K) int64 slots of the row's memory, best first; meaningless where not ``valid``."""
    valid: Tensor
    """(B, H, N, K) bool."""
    weights: Tensor
    """(B, H, N, K) softmax over the neighbours."""
    share: Tensor
    """(B, H, N) share of the layer's output that comes from the memory; on the model's device, for
    a copy would wait for a GPU."""
    queries: Tensor
    """(B, H, N, D) what was searched for."""

    def parts(self) -> Tensor:
        """(B, H, N, K) each neighbour's part of its head's output, on the device of the memory."""
        return self.weights * self.share.to(self.weights.device)[..., None]


class MemoryReader(nn.Module):
    """Joins local attention with attention to the ``top_k`` pairs that each query retrieves.

    ``output = share * memory + (1 - share) * local``, the share by the gate. Where a row's memory
    is empty the share is 0, so the output is plain local attention. Wu et al., 2022, section 3.1.

    Args:
        num_heads: query heads H.
        num_kv_heads: key/value heads G of the memory.
        d_model: width of the hidden states, for gates that read them.
        config: the memory's settings.
        search: how neighbours are found.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, d_model: int, config: MemoryConfig, search: Search
    ) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.search = search
        self.top_k = config.top_k
        self.gate = GATES[config.combine](num_heads, d_model, config)
        self.bias: MemoryBias | None = None
        if config.position_bias != "none":
            self.bias = MemoryBias(
                config.position_bias, num_heads, config.bias_buckets, config.bias_max_distance
            )

    def retrieve(self, queries: Tensor, memory: Readable) -> tuple[MemoryAttention, Tensor, Tensor]:
        """Search with detached queries, attend with live ones.

        Args:
            queries: (B, H, N, D), scaled so that the inner product with a key is the score, on the
                memory's device.
            memory: of these B rows.

        Returns:
            the attention with its head dimensions as (B, H, N, ...), slots and their validity
            (B, H, N, K).
        """
        batch, heads, segment, width = queries.shape
        grouped = queries.reshape(batch, self.num_kv_heads, -1, width)
        with torch.autocast(queries.device.type, enabled=False):
            neighbours = self.search(grouped.detach(), memory, self.top_k)
        shape = (batch, heads, segment)
        slots, valid = (x.reshape(*shape, -1) for x in neighbours)
        bias = None
        if self.bias is not None:
            row = torch.arange(batch, device=queries.device)[:, None, None, None]
            safe = slots.masked_fill(~valid, 0)
            here = memory.written[:, None] + torch.arange(segment, device=queries.device)
            distance = here[:, None, :, None] - memory.positions[row, safe]
            bias = self.bias(distance, memory.age()[row, safe], memory.size)
            bias = bias.reshape(*grouped.shape[:3], -1)
        found = attend(grouped, memory, neighbours, bias)
        return MemoryAttention(*(x.reshape(*shape, *x.shape[3:]) for x in found)), slots, valid

    def forward(
        self,
        queries: Tensor,
        local: Tensor,
        local_mass: Tensor | None,
        hidden: Tensor,
        memory: Readable,
    ) -> tuple[Tensor, Retrieval]:
        """Read the memory; changes nothing in it.

        Args:
            queries: (B, H, N, D), scaled, on the memory's device.
            local: (B, H, N, D) the outcome of local attention, on the model's device.
            local_mass: (B, H, N) its log mass; None unless ``gate.needs_local_mass``.
            hidden: (B, N, d_model) what the layer's attention reads.
            memory: of these B rows.

        Returns:
            the heads' outputs (B, H, N, D), on the model's device, and what was retrieved.
        """
        found, slots, valid = self.retrieve(queries, memory)
        output, mass, any_found = (
            part.to(local.device) for part in (found.output, found.log_mass, found.found)
        )
        share = self.gate.share(hidden, local_mass, mass) * any_found
        heads = local + share[..., None] * (output - local)
        retrieval = Retrieval(
            slots, valid, found.weights.detach(), share.detach(), queries.detach()
        )
        return heads, retrieval
