"""Which settings may differ between the run that wrote a checkpoint and the one that reads it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from build import logits_of, random_tokens, read, small_config, small_model
from torch import Tensor

from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.model import compiled as compiling
from memorizing_transformers.model.config import RUNTIME

OTHER: dict[str, Any] = {
    "vocab_size": 29,
    "d_model": 32,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "d_ff": 24,
    "activation": "relu2",
    "value_residual": True,
    "embedding_shortcut": True,
    "zero_init_outputs": True,
    "dropout": 0.5,
    "xl_cache": 9,
    "qk_norm": False,
    "qk_scale_init": 3.0,
    "relative_buckets": 16,
    "relative_max_distance": 40,
    "relative_init": 2.0,
    "activation_checkpointing": True,
    "compile": True,
}
"""For every field of the model another value than ``small_config`` has."""
OTHER_MEMORY: dict[str, Any] = {
    "size": 20,
    "top_k": 2,
    "layers": [0],
    "search": "bucketed",
    "recall_target": 0.5,
    "search_bytes": 2**20,
    "combine": "joint",
    "fixed_value": 0.9,
    "gate_init": 0.9,
    "position_bias": "none",
    "bias_buckets": 16,
    "bias_max_distance": 200,
    "dtype": "bfloat16",
    "device": "cpu",
    "refresh_every_n_steps": 3,
    "drop_after_n_steps": 3,
    "drop_below_cosine": 0.5,
    "temperature": True,
    "match_length": 4,
    "candidates": 3,
    "copy": ["repeats"],
    "copy_init": 0.5,
    "copy_top_k": 1,
    "dropout": 0.5,
}
REACHES = {"size", "top_k", "candidates", "fixed_value", "dtype", "xl_cache"}
"""What changes how much of the past is read, how exactly, or at what weight: figures with a memory
may differ, those without it not."""


def config(
    model: dict[str, Any] | None = None, memory: dict[str, Any] | None = None
) -> ModelConfig:
    given = asdict(small_config(size=40, position_bias="t5", combine="gate"))
    given.update(model or {})
    given["memory"].update(memory or {})
    return ModelConfig(**given)


def outcome(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a long segment without a memory, and of short ones with one."""
    with torch.no_grad():
        alone = model.eval()(tokens).logits
        return alone, logits_of(read(model, model.new_memory(2), tokens, 10))


def test_every_field_is_looked_at() -> None:
    assert {*OTHER, "memory"} == {field.name for field in fields(ModelConfig)}
    assert set(OTHER_MEMORY) == {field.name for field in fields(MemoryConfig)}


@pytest.mark.parametrize("key", [*OTHER, *(f"memory.{key}" for key in OTHER_MEMORY)])
def test_what_may_differ_changes_no_figure_and_all_else_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compile_apart", "_compiled"):
        monkeypatch.setattr(compiling, name, lambda method, *_, **__: method)
    name = key.removeprefix("memory.")
    inside = key != name
    change = {name: (OTHER_MEMORY if inside else OTHER)[name]}
    ours, theirs = config(), config(memory=change) if inside else config(change)
    assert asdict(ours) != asdict(theirs)
    declared = {field.name: field for field in fields(MemoryConfig if inside else ModelConfig)}
    may_differ = name == "memory" or declared[name].metadata == RUNTIME
    assert (ours.architecture() == theirs.architecture()) == may_differ
    if not may_differ:
        return
    model, other = small_model(ours), Transformer(theirs)
    other.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 60)
    (alone, recalled), (same, again) = (outcome(x, tokens) for x in (model, other))
    assert torch.equal(same, alone)
    if name not in REACHES:
        torch.testing.assert_close(again, recalled, atol=1e-5, rtol=1e-5)
