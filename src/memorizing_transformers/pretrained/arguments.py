"""Arguments that are not known, or cannot work, are refused, with what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from textwrap import shorten
from typing import Any

from ..errors import ConfigError
from ..model import MemoryConfig, ModelConfig

MODEL_TYPE = "memorizing-transformer"
"""By which transformers knows our own models."""
SETTINGS = [field.name for field in fields(ModelConfig)]


def brief(value: Any) -> Any:
    """A value for a message of one line."""
    return value if isinstance(value, bool | int | float | str) else shorten(repr(value), 60)


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Refuse names that are not known.

    Raises:
        ConfigError: naming the first of them and what is near, or else all that are known.
    """
    known = [*known]
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{prefix}{name}", brief(value), f"is not known here; {remedy}")


def check_memory(memory: Any, prefix: str = "memory.") -> None:
    """Refuse a mapping with names that are no fields of ``MemoryConfig``.

    Raises:
        ConfigError: as ``refuse_unknown``.
    """
    if isinstance(memory, Mapping):
        refuse_unknown(memory, [field.name for field in fields(MemoryConfig)], prefix)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of ``ModelConfig``, nor of its memory.

    Raises:
        ConfigError: as ``refuse_unknown``.
    """
    refuse_unknown(settings, SETTINGS, "model.")
    check_memory(settings.get("memory"), "model.memory.")


def check_placement(
    memory: MemoryConfig, xl_cache: int, position: str, skip_first: int, prefix: str
) -> None:
    """Refuse settings of a pretrained model's memory that cannot work.

    Args:
        memory: settings of the memory.
        xl_cache: cached tokens of every layer.
        position: where retrieved keys are.
        skip_first: pairs at the start of a segment that are never stored.
        prefix: of the keys of ``memory``, for the message.

    Raises:
        ConfigError: naming the setting and what would do.
    """
    if position not in ("distance", "start"):
        raise ConfigError("position", position, "must be distance or start")
    for name, value in (("xl_cache", xl_cache), ("skip_first", skip_first)):
        if value < 0:
            raise ConfigError(name, value, "must be at least 0")
    refused = {"position_bias": "none", "match_length": 0, "copy": [], "candidates": 1}
    for name, only in refused.items():
        given = getattr(memory, name)
        if given != only:
            remedy = f"must be {only}: a pretrained model brings its own positions and head"
            raise ConfigError(f"{prefix}memory.{name}", given, remedy)
