"""The configuration: derived values, and every bad one refused with key, value and remedy."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.optimizers import OptimizerConfig

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"vocab_size": 0}, "model.vocab_size", "at least 1"),
    ({"d_model": 0}, "model.d_model", "at least 1"),
    ({"num_layers": 0}, "model.num_layers", "at least 1"),
    ({"num_heads": 0}, "model.num_heads", "at least 1"),
    ({"num_kv_heads": 0}, "model.num_kv_heads", "at least 1"),
    ({"head_dim": 0}, "model.head_dim", "at least 1"),
    ({"d_ff": -5}, "model.d_ff", "at least 1"),
    ({"xl_cache": -1}, "model.xl_cache", "at least 0"),
    ({"d_model": 10, "num_heads": 4}, "model.num_heads", r"divide model.d_model \(10\)"),
    ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads", r"divide model.num_heads \(4\)"),
    ({"num_heads": 4, "num_kv_heads": 8}, "model.num_kv_heads", r"divide model.num_heads \(4\)"),
    ({"dropout": 1.0}, "model.dropout", r"lie in \[0, 1\)"),
    ({"dropout": -0.1}, "model.dropout", r"lie in \[0, 1\)"),
    ({"dropout": float("nan")}, "model.dropout", r"lie in \[0, 1\)"),
    ({"relative_buckets": 2}, "model.relative_buckets", "at least 4"),
    ({"relative_max_distance": 16}, "model.relative_max_distance", "at least 32"),
]
BAD_MEMORY: list[tuple[dict[str, Any], str, str]] = [
    ({"size": -1}, "size", "at least 0"),
    ({"top_k": 0}, "top_k", "at least 1"),
    ({"size": 16, "top_k": 17}, "top_k", r"at most model.memory.size \(16\)"),
    ({"layers": [4]}, "layers", "between 0 and 3"),
    ({"layers": [0, -5]}, "layers", "between 0 and 3"),
    ({"search": "fast"}, "search", "one of .*exact"),
    ({"recall_target": 0.0}, "recall_target", "between 0 and 1"),
    ({"recall_target": 1.0}, "recall_target", "search=exact"),
    ({"combine": "sum"}, "combine", "gate, fixed, content, joint"),
    ({"fixed_value": 1.5}, "fixed_value", r"\[0, 1\]"),
    ({"fixed_value": -0.5}, "fixed_value", r"\[0, 1\]"),
    ({"gate_init": 0.0}, "gate_init", "between 0 and 1"),
    ({"gate_init": 1.0}, "gate_init", "between 0 and 1"),
    ({"position_bias": "rotary"}, "position_bias", "none, t5, learned-absolute"),
    ({"bias_buckets": 3}, "bias_buckets", "at least 4"),
    ({"bias_max_distance": 8}, "bias_max_distance", "at least 32"),
    ({"dtype": "float16"}, "dtype", "float32, bfloat16, int8"),
    ({"device": "cuda"}, "device", "must be one of model, cpu"),
    ({"search_bytes": 0}, "search_bytes", "at least 1"),
    ({"candidates": 0}, "candidates", "at least 1"),
    ({"candidates": 2}, "candidates", "needs position_bias or match_length to choose by"),
]
BAD += [
    ({"memory": settings}, f"model.memory.{key}", remedy) for settings, key, remedy in BAD_MEMORY
]


FLOATS = [
    (kind, field.name)
    for kind in (ModelConfig, MemoryConfig, OptimizerConfig)
    for field in fields(kind)
    if isinstance(field.default, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=str)
def test_no_number_is_without_bounds(kind: Any, name: str, value: float) -> None:
    def check() -> None:
        made = kind(**{name: value})
        if kind is not ModelConfig:  # which checks itself
            made.validate()

    with pytest.raises(ConfigError, match=f"{name} = {value!r}: must"):
        check()


@pytest.mark.parametrize(("settings", "key", "remedy"), BAD, ids=[str(case[0]) for case in BAD])
def test_a_bad_value_is_refused_in_one_line(
    settings: dict[str, Any], key: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        ModelConfig(**settings)
    given = settings.get("memory", settings)[key.split(".")[-1]]
    assert str(caught.value).startswith(f"{key} = {given!r}: ")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = None: must be set"):
        Transformer(ModelConfig())


@pytest.mark.parametrize(
    "memory",
    [
        {"size": 0, "top_k": 32},
        {"size": 32, "top_k": 32},
        {"layers": []},
        {"layers": [0, 3, -1, -4]},
        {"fixed_value": 0.0},
        {"fixed_value": 1.0},
        {"candidates": 2, "position_bias": "log"},
        {"candidates": 2, "match_length": 1},
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(memory: dict[str, Any]) -> None:
    assert isinstance(ModelConfig(memory=memory).memory, MemoryConfig)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, 0), (2, 1), (3, 2), (4, 2), (6, 4), (12, 8), (24, 17)]
)
def test_the_default_memory_layer_is_three_quarters_of_the_way_up(
    num_layers: int, expected: int
) -> None:
    """The paper has the 9th of 12."""
    assert ModelConfig(num_layers=num_layers).memory_layers == (expected,)


def test_memory_layers_count_from_either_end_each_once() -> None:
    assert ModelConfig(memory=MemoryConfig(layers=[-1, 0, 3])).memory_layers == (0, 3)
    assert ModelConfig(memory=MemoryConfig(layers=[])).memory_layers == ()


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = ModelConfig(d_model=24, num_heads=6)
    assert (config.kv_heads, config.head_width, config.ff_width) == (6, 4, 96)
    config = ModelConfig(d_model=24, num_heads=6, num_kv_heads=2, head_dim=5, d_ff=7)
    assert (config.kv_heads, config.head_width, config.ff_width) == (2, 5, 7)


def test_architecture_leaves_out_what_may_differ_at_run_time() -> None:
    small = ModelConfig(memory=MemoryConfig(size=64, dtype="bfloat16", search="bucketed"))
    large = ModelConfig(memory=MemoryConfig(size=65536, layers=[2]), xl_cache=512, dropout=0.1)
    assert small.architecture() == large.architecture()


@pytest.mark.parametrize(
    "settings",
    [
        {"d_model": 128},
        {"num_kv_heads": 2},
        {"qk_norm": False},
        {"memory": {"combine": "content"}},
        {"memory": {"layers": [0]}},
        {"memory": {"position_bias": "t5"}},
    ],
    ids=str,
)
def test_architecture_tells_models_apart_whose_weights_differ(settings: dict[str, Any]) -> None:
    assert ModelConfig(**settings).architecture() != ModelConfig().architecture()


def test_architecture_is_plain_data() -> None:
    import json

    architecture = ModelConfig(vocab_size=5).architecture()
    assert json.loads(json.dumps(architecture)) == architecture
