"""All that a report tells of one document: its tokens, and one trace for each reading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing_transformers.data.tokens.tokenized_text import TokenizedText

from .trace import Trace


@dataclass(frozen=True)
class Report:
    """A document, read with the memory switched off and with one or two sizes of it."""

    document: str
    """Its file's name."""
    checkpoint: str
    """The checkpoint, as it was given."""
    step: int | None
    """The training step of the weights, where the checkpoint says it."""
    segment: int
    """Tokens N read at once."""
    settings: dict[str, Any]
    """The fields of ``ModelConfig``."""
    gates: dict[int, list[float]]
    """By memory layer the learned share of each head; empty unless ``combine`` is ``gate``."""
    tokens: TokenizedText
    names: dict[int, str]
    """By id what to call the tokens that stand for no text of their own."""
    traces: list[Trace]
    """``off`` first, then by ascending size."""

    @cached_property
    def pieces(self) -> list[str]:
        """The text of every token."""
        return self.tokens.pieces()

    @property
    def off(self) -> Trace:
        """The reading without memory."""
        return self.traces[0]

    @property
    def readings(self) -> list[Trace]:
        """The readings with memory."""
        return self.traces[1:]

    def gain(self, trace: Trace) -> NDArray[np.float64]:
        """(L,) bits that a reading saved on each token, against the memory switched off."""
        return self.off.bits - trace.bits

    @cached_property
    def num_bytes(self) -> float:
        """UTF-8 bytes of the predicted tokens, the document's mean for each, as in training."""
        length = len(self.tokens)
        return len(self.tokens.text.encode("utf-8")) * (length - 1) / length

    def summary(self) -> list[dict[str, Any]]:
        """By reading: memory, perplexity and bits per byte."""
        return [
            {
                "name": trace.name,
                "size": trace.size,
                "perplexity": math.exp(trace.mean_nats),
                "bits_per_byte": float(trace.bits[1:].sum()) / self.num_bytes,
            }
            for trace in self.traces
        ]

    def chance(self) -> float:
        """How often two tokens drawn from the document at random are the same."""
        _, counts = np.unique(self.tokens.ids, return_counts=True)
        return float(((counts / counts.sum()) ** 2).sum())
