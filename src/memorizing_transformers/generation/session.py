"""A text that is read and continued, token by token or all at once, as training would read it.

Shapes: B rows, N segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from ..errors import ConfigError
from ..memory import MemoryBank, OpenSegment
from ..model import MemorizingNet, ModelOutput

UNKNOWN_LENGTH = 512
"""Tokens of a segment, of a model that does not say how it was trained and has no XL cache."""


class Session:
    """What B rows have read: a bank, and the open segment that follows it.

    Pairs are written when a segment is full, as in training, so a text read token by token gives
    the logits of one read segment by segment.

    Args:
        model: the network; read in evaluation mode.
        batch_size: rows B.
        segment_length: tokens N of a segment.
        bank: what was read before; None for nothing. It is written to.

    Raises:
        ConfigError: where a segment would hold no token, or more than the network can read.
    """

    def __init__(
        self,
        model: MemorizingNet,
        batch_size: int = 1,
        segment_length: int = 512,
        bank: MemoryBank | None = None,
    ) -> None:
        if segment_length < 1:
            raise ConfigError("segment_length", segment_length, "must be at least 1")
        model.check_segment_length(segment_length)
        self.model = model.eval()
        self.segment_length = segment_length
        self.bank = model.new_memory(batch_size) if bank is None else bank
        self.open = OpenSegment(self.bank, segment_length)
        self.count = 0
        """Tokens that a row has read."""
        self.observer: Callable[[Session, Tensor, ModelOutput], object] | None = None
        """Called with each part that is read and its output, before its pairs are written."""

    def parts(self, input_ids: Tensor) -> Iterator[tuple[Tensor, ModelOutput]]:
        """Read on, and give the tokens (B, m) and the output of each part.

        A part ends where a segment is full. A part's pairs are written when the next one is asked
        for, so what it retrieved is still in its slots.

        Args:
            input_ids: (B, any number) int64.
        """
        start, count = 0, input_ids.shape[1]
        while start < count:
            room = self.segment_length - self.open.count
            part = input_ids[:, start : start + room]
            whole = part.shape[1] == self.segment_length
            with torch.no_grad():
                # A full segment is read as training reads it, with no buffer.
                output = self.model(part, self.bank, open_segment=None if whole else self.open)
            if self.observer is not None:
                self.observer(self, part, output)
            yield part, output
            start += part.shape[1]
            self.count += part.shape[1]
            if whole or self.open.count == self.segment_length:
                self.bank.own()
            if whole:
                self.bank.commit(output.pairs, token_ids=part)
            elif self.open.count == self.segment_length:
                self.bank.commit(self.open.pairs(), token_ids=self.open.input_ids)
            else:
                continue
            self.open = OpenSegment(self.bank, self.segment_length)

    def close(self) -> None:
        """Write the pairs of the open segment though it is not full, and begin another one."""
        if self.open.count:
            self.bank.own()
            self.bank.commit(self.open.pairs(), token_ids=self.open.input_ids)
            self.open = OpenSegment(self.bank, self.segment_length)

    def take(self, rows: Sequence[int]) -> Session:
        """A session whose row ``i`` has read what row ``rows[i]`` of this one has.

        Both can be read on. They share their memories until they write.
        """
        taken = copy(self)
        taken.bank = self.bank.take(rows)
        taken.open = self.open.take(torch.tensor([*rows], dtype=torch.int64), taken.bank)
        return taken

    def read(self, input_ids: Tensor) -> Tensor:
        """Read on.

        Args:
            input_ids: (B, any number) int64.

        Returns:
            logits (B, V) after the last token.

        Raises:
            ValueError: where there is no token.
        """
        logits = None
        for _, output in self.parts(input_ids):
            assert output.logits is not None
            logits = output.logits[:, -1]
        if logits is None:
            raise ValueError("there is no token to read")
        return logits
