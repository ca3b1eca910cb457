"""Weights under the names that earlier versions gave them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

RENAMED = (
    (re.compile(r"\.attention\.gate$"), r".attention.reader.gate.logit"),
    (re.compile(r"\.attention\.gate\.(weight|bias)$"), r".attention.reader.gate.linear.\1"),
    (re.compile(r"\.attention\.memory_bias\."), r".attention.reader.bias."),
)


def current_name(name: str) -> str:
    """Today's name of a weight; its own where it was never renamed."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def with_current_names(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Weights by today's names, in the order that they came in."""
    return {current_name(name): value for name, value in weights.items()}
