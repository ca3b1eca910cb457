"""One training step's tokens for the rows of one rank.

Shapes: B rows, N tokens in a segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

WITHOUT_FP64 = {"mps"}
"""Types of device that have no 64-bit floating-point numbers."""


def fp64_device(device: torch.device) -> torch.device:
    """Where a device's float64 numbers live: there, or on the CPU where it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FP64 else device


def in_fp64(tensor: Tensor) -> Tensor:
    """The numbers in float64, on ``fp64_device``."""
    return tensor.to(fp64_device(tensor.device)).double()


class Batch(NamedTuple):
    """One segment of one document per row.

    Every number is an integer: a trainer that computes in a short dtype converts those that are
    not.

    A row's segment is filled from the left; padding is only after a document's end and has the
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
    text_bytes: Tensor
    """(B,) int64; UTF-8 bytes of the document, 0 for an idle row."""
    text_tokens: Tensor
    """(B,) int64; tokens of the document, 1 for an idle row."""

    @property
    def mask(self) -> Tensor:
        """(B, N) bool; True at real tokens."""
        return self.targets != IGNORE_INDEX

    @property
    def num_bytes(self) -> Tensor:
        """(B,) float64; UTF-8 bytes that the counted targets stand for, for bits per byte: the
        document's bytes, split evenly over its tokens."""
        counted = in_fp64(self.mask.sum(1) * self.text_bytes)
        return counted / in_fp64(self.text_tokens)
