"""Weights under the names, and in the shapes, that earlier versions gave them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RENAMED = (
    (re.compile(r"\.attention\.gate$"), r".attention.reader.gate.logit"),
    (re.compile(r"\.attention\.gate\.(weight|bias)$"), r".attention.reader.gate.linear.\1"),
    (re.compile(r"\.attention\.memory_bias\."), r".attention.reader.bias."),
)

ONCE_SCALARS = re.compile(r"(^|\.)copy_head\..*\.(slope|toward_likely)$")
"""Numbers of the copy head that had no dimension; sharding (FSDP2) wants one."""


def current_name(name: str) -> str:
    """Today's name of a weight; its own where it was never renamed."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def in_current_shape(name: str, tensor: Tensor) -> Tensor:
    """A weight, its gradient or a moment of it in today's shape.

    Args:
        name: today's name of the weight.
        tensor: as saved.
    """
    return tensor.reshape(1) if tensor.ndim == 0 and ONCE_SCALARS.search(name) else tensor


def as_today(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by today's names and in today's shapes, in the order that they came in."""
    named = ((current_name(name), value) for name, value in weights.items())
    return {name: in_current_shape(name, value) for name, value in named}
