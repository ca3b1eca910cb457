"""The cost model against real models and memories."""

from __future__ import annotations

import pytest

from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.training.estimate import estimate

SHAPES = [
    {},
    {"num_kv_heads": 2, "head_dim": 12, "d_ff": 40, "xl_cache": 16},
    {"qk_norm": False, "memory": {"combine": "content", "size": 64}},
    {"memory": {"combine": "joint", "position_bias": "t5", "layers": [0, 2], "size": 64}},
    {"memory": {"dtype": "bfloat16", "size": 100}},
    {"memory": {"dtype": "int8", "size": 100}, "num_kv_heads": 2},
    {"memory": {"size": 0}},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_what_the_model_has(shape: dict[str, object]) -> None:
    config = ModelConfig(vocab_size=50, d_model=32, num_layers=3, num_heads=4, **shape)
    model = Transformer(config)
    cost = estimate(config, rows=2, segment=8)
    assert cost.parameters == sum(weight.numel() for weight in model.parameters())
    bank = model.new_memory(2)
    counters = ("written", "origin", "oldest", "bound")
    tensors = [m.tensors() for m in bank.memories.values()]
    assert cost.memory_bytes == sum(
        x.nbytes for named in tensors for name, x in named.items() if name not in counters
    )
    assert cost.cache_bytes == sum(x.keys.nbytes + x.values.nbytes for x in bank.caches.values())
    assert (cost.search_flops == 0) == (config.memory.size == 0)
    assert cost.device_bytes > cost.weight_bytes
    assert 0 <= cost.memory_share < 1


def test_the_memory_costs_what_its_size_says() -> None:
    costs = [
        estimate(ModelConfig(vocab_size=50, memory={"size": size}), 2, 128)  # type: ignore[arg-type]
        for size in (1024, 2048)
    ]
    assert costs[1].search_flops == 2 * costs[0].search_flops
    assert costs[1].model_flops == costs[0].model_flops
    assert costs[1].memory_bytes == 2 * costs[0].memory_bytes


def test_a_refresh_costs_forward_passes_of_what_is_stored() -> None:
    """Every step and with as many slots as a segment: one forward pass up to the memory layer."""
    shape = {"vocab_size": 50, "num_layers": 4, "xl_cache": 128}
    costs = {
        (size, every): estimate(
            ModelConfig(**shape, memory={"size": size, "refresh_every_n_steps": every}),  # type: ignore[arg-type]
            rows=2,
            segment=128,
        )
        for size, every in ((128, 0), (128, 1), (1024, 4))
    }
    assert costs[128, 0].refresh_flops == 0
    once = costs[128, 1].refresh_flops
    assert 0.7 < once / (costs[128, 1].model_flops / 3 * 3 / 4) < 1
    assert costs[1024, 4].refresh_flops == pytest.approx(2 * once)
    assert costs[128, 1].memory_share > costs[128, 0].memory_share


def test_an_index_lives_on_the_host() -> None:
    config = ModelConfig(vocab_size=50, memory={"search": "faiss"})  # type: ignore[arg-type]
    assert estimate(config, 2, 128).host_bytes > 0
    assert estimate(ModelConfig(vocab_size=50), 2, 128).host_bytes == 0


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        estimate(ModelConfig(), 1, 8)
    assert any("FLOPs" in line for line in estimate(ModelConfig(), 1, 8, 256).lines())
