"""What ``memorize`` is given holds as it was given, or is refused by its name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from transformers import GenerationConfig

from memorizing_transformers import MemoryConfig, memorize
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.causal_lm import causal_lm
from memorizing_transformers.generation.session import Session
from memorizing_transformers.training.checkpoint.opening import open_for_use

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


def test_a_segment_is_at_most_as_long_as_the_window() -> None:
    model = memorize(tiny("llama", max_position_embeddings=16), SIZES, layers=[0])
    ids = torch.zeros(1, 17, dtype=torch.int64)
    model(ids[:, :16], model.new_memory(1))
    model(ids)  # as it was
    with pytest.raises(ConfigError, match=r"^segment_length = 17: .*\(16\)"):
        model(ids, model.new_memory(1))
    with pytest.raises(ConfigError, match=r"^segment_length = 17: "):
        Session(model, 1, 17)


def test_a_small_window_is_the_segment_of_a_model_that_had_no_memory(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    tiny("llama", **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, length = open_for_use(str(tmp_path), None, 64)
    assert (length, model.xl_cache) == (24, 24)
    with pytest.raises(ConfigError, match=r"^segment_length = 25: .*\(24\)"):
        open_for_use(str(tmp_path), 25, 64)


@pytest.mark.parametrize("option", ["assistant_model", "prompt_lookup_num_tokens"])
def test_generation_that_takes_tokens_back_is_refused(option: str) -> None:
    model = causal_lm(memorize(tiny("llama"), SIZES, layers=[0]), 8)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=rf"^{option} = .*cannot") as caught:
        model.generate(ids, max_new_tokens=2, **{option: 3})
    assert "\n" not in str(caught.value)
    settings = GenerationConfig(max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(ConfigError, match=r"^prefill_chunk_size = 4: "):
        model.generate(ids, generation_config=settings)
