"""What gives a pretrained model a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError
from ..model import MemoryConfig
from .arguments import brief, check_layers, check_memory
from .induction import induction_layers
from .memorized import MemorizedModel

DEFAULTS = {"combine": "joint-bias", "temperature": True}
"""Settings of a pretrained model's memory that differ from those of our own models: with them, an
untrained memory is one softmax over local and retrieved keys."""


def memorize(
    model: nn.Module,
    memory: MemoryConfig | Mapping[str, Any] | None = None,
    layers: Sequence[int] | Literal["auto"] = "auto",
    xl_cache: int = 0,
    position: Literal["distance", "start"] = "distance",
    skip_first: int = 1,
) -> MemorizedModel:
    """Give a pretrained model a memory.

    Args:
        model: a decoder that ``AutoModelForCausalLM.from_pretrained`` loaded.
        memory: settings of the memory. A mapping gives some of them, and the others are those that
            need no training: ``combine`` joint-bias and a temperature. A ``MemoryConfig`` gives all
            of them, and is left as it was.
        layers: the memory layers; negative indices count from the last one. auto takes those of
            ``memory``, or else the layers with induction heads, and prints what it found.
        xl_cache: tokens of the segment before that every layer still sees. 0 = none.
        position: where retrieved keys are: at their true distance (distance), but not farther than
            the model was trained on, or at the start of the segment (start).
        skip_first: pairs at the start of each segment that are never stored.

    Raises:
        ConfigError: where the family is not supported, or a setting cannot work.
    """
    if not isinstance(memory, MemoryConfig):
        check_memory(memory)
        memory = MemoryConfig(**{**DEFAULTS, **(memory or {})})
    check_layers(layers, "layers", "auto")
    check_layers(memory.layers, "memory.layers", None)
    given = memory.layers
    if given is not None and layers != "auto" and [*given] != [*layers]:
        remedy = f"memory.layers is {given}; give one of the two"
        raise ConfigError("layers", brief([*layers]), remedy)
    if layers == "auto":
        layers = induction_layers(model) if given is None else given
    memory = replace(memory, layers=[*layers])
    return MemorizedModel(model, memory, xl_cache, position, skip_first)
