"""Arguments that are not known, or cannot work, are refused, with what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
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


def check_layers(layers: Any, key: str, unset: str | None) -> None:
    """Refuse what are no indices of layers.

    Args:
        layers: what was given.
        key: of it, for the message.
        unset: stands for layers that are chosen.

    Raises:
        ConfigError: naming it.
    """
    if layers == unset:
        return
    # A set has no order, and a text is a sequence of texts.
    whole = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not whole or not all(type(layer) is int for layer in layers):
        remedy = f"must be {unset}, or a list of indices of layers, such as [-1]"
        raise ConfigError(key, brief(layers), remedy)


def check_memory(memory: Any, prefix: str = "memory.") -> None:
    """Refuse what are no settings of a memory: names that are no fields, and values of other types.

    Raises:
        ConfigError: as ``refuse_unknown``, or naming the value and what would do.
    """
    if memory is None or isinstance(memory, MemoryConfig):
        return
    if not isinstance(memory, Mapping):
        remedy = "must be a mapping of settings, such as {'size': 8192}"
        raise ConfigError(prefix.rstrip("."), brief(memory), remedy)
    refuse_unknown(memory, [field.name for field in fields(MemoryConfig)], prefix)
    default = MemoryConfig()
    for name, value in memory.items():
        kind = type(getattr(default, name))
        wanted = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(kind)
        if wanted is not None and type(value) not in wanted:
            remedy = f"must be of the type {kind.__name__}, such as {getattr(default, name)!r}"
            raise ConfigError(f"{prefix}{name}", brief(value), remedy)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of ``ModelConfig``, nor of its memory.

    Raises:
        ConfigError: as ``refuse_unknown``.
    """
    refuse_unknown(settings, SETTINGS, "model.")
    check_memory(settings.get("memory"), "model.memory.")


def check_options(options: Mapping[str, Any], with_bank: bool) -> None:
    """Refuse options of a forward pass that would mean something else than they say.

    Args:
        options: of the base's own forward.
        with_bank: whether a memory is read.

    Raises:
        ConfigError: naming the first of them and what would do.
    """
    if options.get("labels") is not None:
        remedy = "take the loss yourself: model.loss(output.logits, targets)"
        raise ConfigError("labels", brief(options["labels"]), remedy)
    if with_bank and options.get("position_ids") is not None:
        remedy = "leave it out: with a memory, a segment is at positions 0 to N - 1"
        raise ConfigError("position_ids", brief(options["position_ids"]), remedy)


def check_window(segment_length: int, window: int, prefix: str) -> None:
    """Refuse a segment whose last token is at a position that the base was not trained on.

    Args:
        segment_length: tokens of it.
        window: tokens that the base was trained on.
        prefix: of the keys of the model, for the message.

    Raises:
        ConfigError: naming both.
    """
    if segment_length > window:
        key = "data.segment_length" if prefix else "segment_length"
        remedy = f"must be at most the window of the pretrained model ({window})"
        raise ConfigError(key, segment_length, remedy)


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
        if type(value) is not int or value < 0:
            raise ConfigError(name, brief(value), "must be a whole number of at least 0")
    refused = {"position_bias": "none", "match_length": 0, "copy": [], "candidates": 1}
    for name, only in refused.items():
        given = getattr(memory, name)
        if given != only:
            remedy = f"must be {only}: a pretrained model brings its own positions and head"
            raise ConfigError(f"{prefix}memory.{name}", given, remedy)
