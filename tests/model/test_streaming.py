"""Snapshot in segments equals reading at once, where the state holds all that was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import logits_of, random_tokens, read, small_config, small_model
from torch import nn

from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.model.bias import LocalBias


@pytest.mark.parametrize("segment", [1, 4, 5, 24])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk norm", "no qk norm"])
def test_with_a_cache_as_long_as_the_document(qk_norm: bool, segment: int) -> None:
    model = small_model(layers=[], xl_cache=24, qk_norm=qk_norm, num_layers=3)
    tokens = random_tokens(2, 24)
    streamed = logits_of(read(model, model.new_memory(2), tokens, segment))
    torch.testing.assert_close(streamed, model(tokens).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [24, 100])
@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": False}, {"num_kv_heads": 1}, {"search": "bucketed"}], ids=str
)
def test_with_a_joint_memory_that_returns_everything(settings: dict[str, Any], size: int) -> None:
    """One softmax over all older pairs and the segment is attention over the whole document."""
    config = small_config(combine="joint", layers=[0, 1], size=size, top_k=24, **settings)
    model = without_local_bias(small_model(config))
    tokens = random_tokens(2, 24)
    streamed = logits_of(read(model, model.new_memory(2), tokens, 4))
    torch.testing.assert_close(streamed, model(tokens).logits, atol=1e-5, rtol=1e-4)


def test_with_a_joint_memory_whose_bias_is_the_local_one() -> None:
    """The same tables at the same distances: the bias counts tokens across segments."""
    model = small_model(combine="joint", layers=[0, 1], size=24, top_k=24, position_bias="t5")
    for layer in model.layers:
        local, far = layer.attention.bias, layer.attention.reader.bias
        far.table, far.num_buckets = local.table, local.num_buckets
        far.max_distance = local.max_distance
    tokens = random_tokens(2, 24)
    streamed = logits_of(read(model, model.new_memory(2), tokens, 4))
    torch.testing.assert_close(streamed, model(tokens).logits, atol=1e-5, rtol=1e-4)


def without_local_bias(model: Transformer) -> Transformer:
    for module in model.modules():
        if isinstance(module, LocalBias):
            nn.init.zeros_(module.table.weight)
    return model


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_a_larger_memory_at_test_time_reaches_further_back(combine: str) -> None:
    def with_size(size: int) -> ModelConfig:
        return small_config(combine=combine, size=size, top_k=8)

    trained = small_model(with_size(64))
    larger = Transformer(with_size(256))
    larger.load_state_dict(trained.state_dict())
    tokens = random_tokens(1, 256)
    furthest, logits = [], []
    for model in (trained, larger):
        bank = model.new_memory(1)
        outputs = read(model, bank, tokens, 16)
        last = outputs[-1].retrievals[1]
        positions = bank.memories[1].positions[0]
        # The last segment was committed since: it overwrote the 16 slots after the one it read.
        retrieved = positions[last.slots[0]] - torch.where(
            positions[last.slots[0]] >= 240, model.config.memory.size, 0
        )
        furthest.append(int(240 - retrieved.min()))
        logits.append(logits_of(outputs))
    assert furthest[0] <= 64 < furthest[1] <= 256
    assert torch.equal(logits[0][:, :64], logits[1][:, :64])
    assert not torch.allclose(logits[0][:, -16:], logits[1][:, -16:])
