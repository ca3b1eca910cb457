"""What training, its callbacks and its checkpoints need from a network.

Shapes: B rows, N segment, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import MemoryBank, OpenSegment, SegmentPairs
from .forecast import IGNORE_INDEX
from .reader import MemoryReader, Retrieval


@dataclass
class ModelOutput:
    """What a forward pass returns."""

    logits: Tensor | None
    """(B, N, V); None where targets were given."""
    pairs: SegmentPairs
    """The segment's keys and values, for ``MemoryBank.commit``."""
    retrievals: dict[int, Retrieval] = field(default_factory=dict)
    """By memory layer what was retrieved; empty without a memory."""
    copied: Tensor | None = None
    """(B, N) weight of the copies in the prediction, in [0, 1]; None without a copy head."""
    nll: Tensor | None = None
    """(B, N) fp32 negative log-likelihood of the targets, 0 where they do not count; None without
    targets."""
    hits: Tensor | None = None
    """(B, N) bool: the target is the likeliest token; None without targets."""


class MemorizingNet(nn.Module):
    """A language model that reads a ``MemoryBank``; all that training knows of a network.

    A subclass gives ``forward``, ``new_memory`` and ``architecture``, and ``readers`` if its layers
    have ``MemoryReader``s. The other methods follow from these; override one where the network can
    do better.
    """

    def forward(
        self,
        input_ids: Tensor,
        memory: MemoryBank | None = None,
        *,
        open_segment: OpenSegment | None = None,
    ) -> ModelOutput:
        """Read a segment and change nothing; ``memory.commit(output.pairs, token_ids=...)`` writes.

        Args:
            input_ids: (B, N) int64.
            memory: the bank of these B rows, or None for plain attention within the segment.
            open_segment: of ``memory``; the tokens follow those that it holds, and are added to it.
        """
        raise NotImplementedError

    def new_memory(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        size: int | None = None,
    ) -> MemoryBank:
        """An empty bank.

        Args:
            batch_size: rows B.
            device: where the bank is stored. Default: with the weights.
            size: slots of each memory. 0 switches the memory off and keeps the XL caches. Default:
                the configured size.
        """
        raise NotImplementedError

    def architecture(self) -> dict[str, Any]:
        """Settings by key on which the shapes and the meaning of the weights depend.

        Weights of another architecture are refused.
        """
        raise NotImplementedError

    def check_segment_length(self, segment_length: int) -> None:
        """Refuse segments that are too long for the network. Default: none is.

        Args:
            segment_length: tokens N of a segment to come.

        Raises:
            ConfigError: naming it and the most that will do.
        """

    def readers(self) -> dict[int, MemoryReader]:
        """By layer, the module that reads the memory."""
        return {}

    def memory_parameters(self) -> list[nn.Parameter]:
        """The parameters that are only used with a memory: those of the readers."""
        return [p for reader in self.readers().values() for p in reader.parameters()]

    def blocks(self) -> list[nn.Module]:
        """The modules whose weights are sharded one by one, to be gathered one after the other."""
        return []

    def encode(self, input_ids: Tensor, memory: MemoryBank) -> SegmentPairs:
        """The pairs of a segment up to the last memory layer.

        Args:
            input_ids: (B, N) int64, on any device.
            memory: the bank of these B rows.
        """
        home = next(self.parameters()).device
        output: ModelOutput = self(input_ids.to(home), memory)
        return output.pairs

    def score(self, input_ids: Tensor, memory: MemoryBank | None, targets: Tensor) -> ModelOutput:
        """Read a segment, as ``forward`` does, and the losses of targets.

        Here they follow from all logits; a network that can do without overrides this.

        Args:
            input_ids: (B, N) int64.
            memory: the bank of these B rows, or None.
            targets: (B, N) int64, -100 for tokens that do not count.

        Returns:
            an output that has ``nll`` and ``hits``.
        """
        output: ModelOutput = self(input_ids, memory)
        assert output.logits is not None
        output.nll = self.loss(output.logits, targets, reduction="none")
        output.hits = output.logits.detach().argmax(-1) == targets
        output.logits = None
        return output

    @staticmethod
    def loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Negative log-likelihood in fp32 over counted tokens.

        Args:
            logits: (B, N, V).
            targets: (B, N) int64, -100 for tokens that do not count.
            reduction: mean over counted tokens, sum, or none for (B, N).
        """
        flat = logits.float().flatten(0, 1)
        loss = F.cross_entropy(
            flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
        )
        return loss.view_as(targets) if reduction == "none" else loss
