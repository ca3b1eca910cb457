"""The reader: searches a memory, attends to what it found, and joins it with local attention.

It knows queries, hidden states and a memory, and no particular attention, so any attention can use
it.

Shapes: B rows, N segment, H query heads, G key/value heads, D head width, K neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..memory import (
    MemoryAttention,
    MemoryView,
    Neighbours,
    Readable,
    Search,
    attend,
    merge,
    scores_of,
)
from .bias import MemoryBias
from .config import MemoryConfig
from .gates import GATES, Evidence
from .matching import MatchBias, match_lengths


class Shelf(NamedTuple):
    """What a memory layer retrieved from a library for one segment."""

    slots: Tensor
    """(B, H, N, K) int64 slots of the library's one row; meaningless where not ``valid``."""
    valid: Tensor
    """(B, H, N, K) bool."""
    weights: Tensor
    """(B, H, N, K) shares of the softmax over what was found in the memory and in the library."""


class Retrieval(NamedTuple):
    """What a memory layer retrieved for one segment; on the device of the memory."""

    slots: Tensor
    """(B, H, N, K) int64 slots of the row's memory; meaningless where not ``valid``. As the search
    orders them, which knows no biases: ``weights`` tell which count most."""
    valid: Tensor
    """(B, H, N, K) bool."""
    weights: Tensor
    """(B, H, N, K) softmax over the neighbours."""
    share: Tensor
    """(B, H, N) share of the layer's output that comes from the memory; on the model's device, for
    a copy would wait for a GPU."""
    queries: Tensor
    """(B, H, N, D) what was searched for."""
    log_mass: Tensor
    """(B, H, N) log of the summed exponentials of the scores."""
    read: Tensor
    """(B, H, N) bool, False where the memory was empty or left out."""
    searched: Tensor
    """(B, H, N, K') int64 slots that the search gave; ``slots`` are those that were kept."""
    searched_valid: Tensor
    """(B, H, N, K') bool."""
    library: Shelf | None = None
    """What was retrieved from the memory's library in the same softmax."""

    def parts(self) -> Tensor:
        """(B, H, N, K) each neighbour's part of its head's output, on the device of the memory."""
        return self.weights * self.share.to(self.weights.device)[..., None]

    def detach(self) -> Retrieval:
        """The same without a gradient."""
        live: dict[str, Any] = {
            name: value.detach()
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**live)


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
        self.size = config.size
        self.top_k = config.top_k
        self.candidates = config.candidates
        self.dropout = config.dropout
        self.gate = GATES[config.combine](num_heads, d_model, config)
        self.bias: MemoryBias | None = None
        if config.position_bias != "none":
            self.bias = MemoryBias(
                config.position_bias, num_heads, config.bias_buckets, config.bias_max_distance
            )
        self.match: MatchBias | None = None
        if config.match_length:
            self.match = MatchBias(num_heads, config.match_length)
        self.log_temperature: nn.Parameter | None = None
        if config.temperature:
            self.log_temperature = nn.Parameter(torch.zeros(num_heads))
        self.softcap: float | None = None
        """Bound of the scores, for a pretrained model that bounds its own."""

    def biases(
        self,
        input_ids: Tensor | None,
        memory: Readable,
        slots: Tensor,
        read: Readable | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores of pairs (B, H, N, K) and their match lengths, if asked.

        With ``read``, the rows' own memory, ``memory`` is its library.
        """
        bias = lengths = None
        if self.bias is not None:
            # Of an open segment, the tokens that are read now are the last ones.
            first = 0 if input_ids is None else input_ids.shape[1] - slots.shape[2]
            here = torch.arange(first, first + slots.shape[2], device=slots.device)
            if read is None:
                row = torch.arange(slots.shape[0], device=slots.device)[:, None, None, None]
                here = memory.written[:, None] + here
                distance = here[:, None, :, None] - memory.positions[row, slots]
                bias = self.bias(distance, memory.age()[row, slots], memory.size)
            else:
                # Wherever a document is in a library, it is as far away as the oldest pair that
                # the memory could hold, so no document that is added changes another one's bias.
                distance = here[:, None] + max(read.size, self.size)
                distance = distance.expand_as(slots)
                bias = self.bias(distance, torch.full_like(slots, read.size - 1), read.size)
        if self.match is not None:
            assert input_ids is not None
            ids = input_ids.to(slots.device)
            longest = self.match.longest
            both = [match_lengths(ids, memory, slots, longest, shift, read) for shift in (0, 1)]
            lengths = torch.stack(both)
            matched = self.match(lengths)
            bias = matched if bias is None else bias + matched
        return bias, lengths

    def retrieve(
        self,
        queries: Tensor,
        memory: Readable,
        input_ids: Tensor | None = None,
        read: Readable | None = None,
    ) -> tuple[MemoryAttention, Neighbours, Neighbours, Tensor | None]:
        """Search with detached queries, attend with live ones.

        Args:
            queries: (B, H, N, D), scaled so that the inner product with a key is the score, on the
                memory's device.
            memory: of these B rows.
            input_ids: the tokens of the segment up to these N, which are its last; only biases need
                them.
            read: the rows' own memory where ``memory`` is its library.

        Returns:
            the attention with its head dimensions as (B, H, N, ...), the pairs that were kept and
            those that the search gave, and the kept ones' mean match length (B, H, N), if asked.
        """
        batch, heads, segment = queries.shape[:3]
        shape = (batch, heads, segment, -1)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(batch, self.num_kv_heads, -1, x.shape[-1])

        search = memory.search or self.search
        with torch.autocast(queries.device.type, enabled=False):
            neighbours = search(
                grouped(queries.detach()), memory, min(self.top_k * self.candidates, memory.size)
            )
        slots, valid = (x.reshape(shape) for x in neighbours)
        searched = Neighbours(slots, valid)
        safe = slots.masked_fill(~valid, 0)
        bias, lengths = self.biases(input_ids, memory, safe, read)
        if self.candidates > 1 and bias is not None and slots.shape[-1] > self.top_k:
            with torch.no_grad():
                asked = grouped(queries.detach()).float()
                near = Neighbours(grouped(safe), grouped(valid))
                scores = scores_of(asked, memory, near).view(shape) + bias
                kept = scores.masked_fill(~valid, -torch.inf).topk(self.top_k).indices
            slots, valid, bias = (x.gather(-1, kept) for x in (slots, valid, bias))
            if lengths is not None:
                lengths = lengths.gather(-1, kept.expand(2, *kept.shape))
        found = attend(
            grouped(queries),
            memory,
            Neighbours(grouped(slots), grouped(valid)),
            None if bias is None else grouped(bias),
            self.softcap,
        )
        found = MemoryAttention(*(x.reshape(*shape[:3], *x.shape[3:]) for x in found))
        match = None
        if lengths is not None:
            match = (found.weights.detach() * lengths.amax(0)).sum(-1)
        return found, Neighbours(slots, valid), searched, match

    def forward(
        self,
        queries: Tensor,
        local: Tensor,
        local_mass: Tensor | None,
        hidden: Tensor,
        memory: Readable,
        input_ids: Tensor | None = None,
        far: Tensor | None = None,
    ) -> tuple[Tensor, Retrieval]:
        """Read the memory, and its library if it has one; changes nothing in them.

        Args:
            queries: (B, H, N, D), scaled, on the memory's device.
            local: (B, H, N, D) the outcome of local attention, on the model's device.
            local_mass: (B, H, N) its log mass; None unless ``gate.needs_local_mass``.
            hidden: (B, N, d_model) what the layer's attention reads.
            memory: of these B rows.
            input_ids: the tokens of the segment up to these N, which are its last; only biases need
                them.
            far: what a library is searched for; None for ``queries``.

        Returns:
            the heads' outputs (B, H, N, D), on the model's device, and what was retrieved.
        """
        if self.log_temperature is not None:
            factor = self.log_temperature.float().exp()[:, None, None]
            queries = queries * factor.to(queries.device)
            far = None if far is None else far * factor.to(far.device)
        found, kept, searched, match = self.retrieve(queries, memory, input_ids)
        shelf = None
        if memory.library is not None:
            asked = queries if far is None else far
            found, shelf = self._with_library(found, asked, memory, input_ids)
        read = found.found
        if self.training and self.dropout:
            spared = torch.rand(read.shape[0], device=read.device) >= self.dropout
            read = read & spared[:, None, None]
        output, mass, any_read = (x.to(local.device) for x in (found.output, found.log_mass, read))
        best = None
        if self.gate.needs_scores:
            best = mass + found.weights.amax(-1).log().to(mass)
            match = None if match is None else match.to(mass)
        evidence = Evidence(mass, local_mass, best, match)
        share = self.gate.share(hidden, evidence) * any_read
        heads = local + share[..., None] * (output - local)
        weights, log_mass = found.weights[..., : kept.slots.shape[-1]], found.log_mass
        queries = queries.detach()
        retrieval = Retrieval(*kept, weights, share, queries, log_mass, read, *searched, shelf)
        return heads, retrieval

    def _with_library(
        self, found: MemoryAttention, queries: Tensor, memory: Readable, input_ids: Tensor | None
    ) -> tuple[MemoryAttention, Shelf]:
        """One softmax over what was found and the neighbours in the memory's library."""
        assert memory.library is not None
        rows = MemoryView(memory.library, [0] * queries.shape[0])
        asked = queries.to(rows.device)
        other, (slots, valid), _, _ = self.retrieve(asked, rows, input_ids, memory)
        other = MemoryAttention(*(part.to(found.output.device) for part in other))
        whole = merge([found, other])
        weights = whole.weights[..., -slots.shape[-1] :].detach()
        return whole, Shelf(slots, valid, weights)
