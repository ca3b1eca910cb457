"""One training step's tokens for the rows of one rank.

Shapes: B rows, N tokens in a segment.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """One segment of one document per row.

    A row's segment is filled from the left; padding stands only behind a document's end and has the
    target ``IGNORE_INDEX``. A row with nothing left to read has ``document == -1`` and no target.
    """

    input_ids: Tensor
    """(B, N) int64; 0 where padded."""
    targets: Tensor
    """(B, N) int64; the next token of the document, ``IGNORE_INDEX`` where padded."""
    reset: Tensor
    """(B,) bool; this segment begins a new document (or the row is idle)."""
    document: Tensor
    """(B,) int64; index of the document in its split, -1 for an idle row."""
    position: Tensor
    """(B,) int64; offset in tokens of the segment's first token in its document."""
    num_bytes: Tensor
    """(B,) float64; UTF-8 bytes that the counted targets stand for, for bits per byte."""

    @property
    def mask(self) -> Tensor:
        """(B, N) bool; True at real tokens."""
        return self.targets != IGNORE_INDEX
