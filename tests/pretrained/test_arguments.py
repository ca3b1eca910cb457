"""What ``memorize`` is given holds as it was given, or is refused by its name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from families import tiny

from memorizing_transformers import MemoryConfig, memorize
from memorizing_transformers.errors import ConfigError

SIZES = {"size": 20, "top_k": 4}


def test_layers_may_be_given_with_the_memory() -> None:
    for memory in ({**SIZES, "layers": [0]}, MemoryConfig(layers=[0], **SIZES)):
        assert memorize(tiny("llama"), memory).memory_layers == (0,)
        assert memorize(tiny("llama"), memory, layers=(0,)).memory_layers == (0,)
        with pytest.raises(ConfigError, match=r"^layers = .*memory\.layers is \[0\]"):
            memorize(tiny("llama"), memory, layers=[1])


def test_settings_are_left_as_they_were() -> None:
    memory = MemoryConfig(**SIZES)
    before = asdict(memory)
    first, second = (memorize(tiny("llama"), memory, layers=[layer]) for layer in (0, 1))
    assert asdict(memory) == before
    assert (first.memory_config.layers, second.memory_config.layers) == ([0], [1])
    # A mapping gives some settings, and the others need no training.
    assert first.memory_config.combine == "gate"
    assert memorize(tiny("llama"), SIZES, layers=[0]).memory_config.combine == "joint-bias"


@pytest.mark.parametrize(
    ("key", "options"),
    [
        *[("layers", {"layers": layers}) for layers in ("all", 2, [1.5], ["1"], [True], None)],
        ("memory.layers", {"memory": {"layers": "all"}}),
        ("memory", {"memory": 8192}),
        ("memory.size", {"memory": {"size": "8192"}}),
        ("memory.top_k", {"memory": {"top_k": 8.0}}),
        ("memory.temperature", {"memory": {"temperature": "yes"}}),
        ("xl_cache", {"xl_cache": "64"}),
        ("skip_first", {"skip_first": 1.0}),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        memorize(tiny("llama"), **{"layers": [0], "memory": SIZES, **options})
    assert str(caught.value).startswith(f"{key} = ")
    assert "\n" not in str(caught.value)
