"""The cost model against real models and memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peak import Peak
from small import make_data, make_module
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memorizing_transformers import __main__ as commands
from memorizing_transformers.memory.search import auto
from memorizing_transformers.memory.search.auto import choose_search
from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.model import forecast as forecasting
from memorizing_transformers.training.estimate import estimate
from memorizing_transformers.training.optimizers import OptimizerConfig, make_optimizer
from memorizing_transformers.training.trainer import MemoryTrainer

SHAPES = [
    {},
    {"num_kv_heads": 2, "head_dim": 12, "d_ff": 40, "xl_cache": 16},
    {"qk_norm": False, "memory": {"combine": "content", "size": 64}},
    {"memory": {"combine": "joint", "position_bias": "t5", "layers": [0, 2], "size": 64}},
    {"memory": {"dtype": "bfloat16", "size": 100}},
    {"memory": {"dtype": "int8", "size": 100}, "num_kv_heads": 2},
    {"memory": {"size": 0}},
    {"value_residual": True, "embedding_shortcut": True, "memory": {"copy": ["repeats"]}},
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


def test_muon_keeps_one_number_of_a_matrix() -> None:
    config = ModelConfig(vocab_size=50, d_model=32, num_layers=3, num_heads=4)
    net = Transformer(config)
    optimizer = make_optimizer(net, OptimizerConfig(name="muon"))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    output = net.score(tokens, net.new_memory(2), tokens)
    sum(p.sum() for p in net.parameters()).add(output.nll.sum()).backward()
    optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values()]
    measured = sum(x.nbytes for x in held if torch.is_tensor(x) and x.numel() > 1)
    cost = estimate(config, 2, 8, optimizer="muon")
    assert cost.optimizer_bytes == pytest.approx(measured, rel=0.01)


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


STEPS: list[dict[str, Any]] = [
    {"segment": 64},
    {"segment": 64, "memory": {"size": 0}},
    {"segment": 300, "xl_cache": 100, "memory": {"size": 1000, "combine": "joint"}},
    {"segment": 40, "num_kv_heads": 4, "d_ff": 100, "memory": {"size": 64, "layers": [0, 2]}},
    {"segment": 64, "activation_checkpointing": True, "xl_cache": 64},
    {"segment": 64, "activation": "relu2", "d_ff": 400},
    {"segment": 64, "dropout": 0.1},
    {"segment": 64, "value_residual": True, "embedding_shortcut": True},
]


@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_flops_and_activations_are_those_of_a_training_step(shape: dict[str, Any]) -> None:
    """All that torch counts; rounding, masks, softmax and sorting are no matrix products."""
    rows, segment = 3, shape["segment"]
    # A memory in bfloat16 is attended by matrix products, which torch can count.
    memory = {"size": 200, "top_k": 8, "search": "exact", "dtype": "bfloat16"}
    memory |= shape.get("memory", {})
    settings = {k: v for k, v in shape.items() if k not in ("segment", "memory")}
    fields = {"vocab_size": 97, "d_model": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(**{**fields, **settings, "memory": memory})
    model = Transformer(config)
    bank, tokens = model.new_memory(rows), torch.randint(97, (rows, segment))
    for _ in range(-(-memory["size"] // segment) + 1):
        with torch.no_grad():
            bank.commit(model(tokens, bank).pairs)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = model.score(tokens, bank, tokens)
        assert output.nll is not None
        loss = output.nll.mean()
        bank.commit(output.pairs)
        loss.backward()
    cost = estimate(config, rows, segment)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    if not config.activation_checkpointing:
        for weight in model.parameters():
            kept.pop(weight.untyped_storage().data_ptr(), None)
        measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        # Half of what the loss needs is kept: all logits fit into one chunk.
        kept_bytes = cost.activation_bytes + cost.loss_bytes / 2
        assert kept_bytes == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [2**20, 2**14], ids=["one chunk", "many"])
def test_the_loss_needs_what_it_says(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "CHUNK", chunk)
    tokens, vocabulary, width = 256, 2048, 16
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with Peak() as forward:
            forecasting.forecast(hidden, weight, targets)
        with Peak() as peak:
            forecasting.forecast(hidden, weight, targets).nll.sum().backward()
    config = ModelConfig(vocab_size=vocabulary, d_model=width, num_heads=1, head_dim=16)
    cost = estimate(config, 1, tokens, activation_bytes=dtype.itemsize)
    assert forward.most < 1.12 * cost.loss_bytes
    # The gradient of the weights, which in half precision exists once more for a moment.
    gradient = vocabulary * width * (4 if dtype == torch.float32 else 10)
    assert cost.loss_bytes + gradient == pytest.approx(peak.most, rel=0.12)


def test_logits_that_are_made_again_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=500, d_model=32, num_layers=1, num_heads=2)
    once = estimate(config, 2, 64)
    monkeypatch.setattr(forecasting, "CHUNK", 500 * 64)
    twice = estimate(config, 2, 64)
    assert twice.model_flops - once.model_flops == 2 * 128 * 500 * 32
    assert twice.loss_bytes == once.loss_bytes / 2
    assert once.device_bytes - twice.device_bytes == twice.loss_bytes


def test_masks_are_named_where_a_gpu_may_keep_them() -> None:
    shape: dict[str, Any] = {"vocab_size": 50, "num_layers": 3, "num_heads": 4, "xl_cache": 64}
    one = 2 * 4 * 128 * (128 + 64) * 2

    def masks(segment: int = 128, **settings: Any) -> int:
        config = ModelConfig(**{**shape, **settings})
        return estimate(config, 2, segment, activation_bytes=2).mask_bytes

    assert masks() == 3 * one
    assert masks(memory={"combine": "joint"}) == 2 * one
    assert masks(activation_checkpointing=True) == 2 * one
    assert masks(segment=4096) == 0  # attention goes in blocks
    cost = estimate(ModelConfig(**shape), 2, 128)
    assert any("without FlexAttention" in line for line in cost.lines())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_checkpoint_bytes_are_those_on_disk(dtype: str, texts: Path, tmp_path: Path) -> None:
    module = make_module(d_model=128, size=2048, dtype=dtype, xl_cache=16)
    keep = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=2)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = MemoryTrainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[keep],
        logger=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, datamodule=make_data(texts))
    measured = sum(path.stat().st_size for path in (tmp_path / "saved.ckpt").iterdir())
    cost = estimate(module.config, rows=4, segment=16)
    assert cost.checkpoint_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("search", ["exact", "faiss", "cells"])
def test_a_memory_on_the_host_is_counted_there(search: str) -> None:
    settings = {"size": 4096, "search": search}
    costs = {
        device: estimate(
            ModelConfig(vocab_size=50, memory={**settings, "device": device}),  # type: ignore[arg-type]
            rows=2,
            segment=128,
        )
        for device in ("model", "cpu")
    }
    here, there = costs["model"], costs["cpu"]
    assert there.memory_bytes == here.memory_bytes > 0
    assert there.checkpoint_bytes == here.checkpoint_bytes
    assert here.device_bytes - there.device_bytes == here.memory_bytes + here.search_bytes
    assert there.host_bytes - there.index_bytes >= there.memory_bytes
    names = [line.split()[0] for line in there.lines()]
    assert names.index("memory") > names.index("host")


@pytest.mark.parametrize("place", ["model", "cpu"])
@pytest.mark.parametrize("size", [64, 65536])
def test_auto_is_the_search_of_the_device_that_holds_the_memory(size: int, place: str) -> None:
    settings = {"size": size, "search": "auto", "device": place}
    config = ModelConfig(vocab_size=50, memory=settings)  # type: ignore[arg-type]
    for device in ("cpu", "cuda"):
        holder = "cpu" if place == "cpu" else device
        named = choose_search(holder, size, 2, config.kv_heads, 512).name
        config.memory.search = named
        told = estimate(config, 2, 512, device=device)
        config.memory.search = "auto"
        assert estimate(config, 2, 512, device=device) == told
        assert told.memory_on_host == (holder != device)


def test_the_command_asks_for_the_device_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(auto, "has_fast_int8", lambda: False)
    printed = {}
    for name in ("cpu", "auto", "gpu"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            f"trainer.accelerator: {name}\nmodel: {{memory: {{size: 65536, search: auto}}}}\n"
            "data: {tokenizer: bytes, segment_length: 1024}\n"
        )
        commands.estimate([str(config)])
        printed[name] = capsys.readouterr().out
    assert printed["cpu"] != printed["gpu"]
    assert printed["auto"] == printed["gpu" if torch.cuda.is_available() else "cpu"]


def counted_flops(shape: dict[str, Any], rows: int, segment: int, **memory: Any) -> float:
    """What torch counts of a training step with a full memory."""
    settings = {"size": 200, "search": "exact", "dtype": "bfloat16", **memory}
    config = ModelConfig(vocab_size=50, **shape, memory=settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Transformer(config)
    bank, tokens = model.new_memory(rows), torch.randint(50, (rows, segment))
    for _ in range(-(-settings["size"] // segment)):
        with torch.no_grad():
            bank.commit(model(tokens, bank).pairs)
    with FlopCounterMode(display=False) as counter:
        model.score(tokens, bank, tokens).nll.mean().backward()
    return counter.get_total_flops()


DOMINATED: list[dict[str, Any]] = [
    {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8},
    {"d_model": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 8},
]


@pytest.mark.parametrize("layers", [[-1], [0, -1]])
@pytest.mark.parametrize("shape", DOMINATED, ids=str)
def test_each_part_of_the_memorys_work_is_that_of_a_training_step(
    shape: dict[str, Any], layers: list[int]
) -> None:
    """Two steps that differ in one part alone tell that part's FLOPs."""
    rows, segment = 3, 32
    seen, told = {}, {}
    for name, memory in {
        "none": {"size": 0, "top_k": 8},
        "few": {"top_k": 8},
        "many": {"top_k": 128},
        "large": {"top_k": 8, "size": 400},
    }.items():
        memory["layers"] = layers
        seen[name] = counted_flops(shape, rows, segment, **memory)
        settings = {"size": 200, "dtype": "bfloat16", **memory}
        config = ModelConfig(vocab_size=50, **shape, memory=settings)  # type: ignore[arg-type]
        told[name] = estimate(config, rows, segment)
    assert told["none"].model_flops == pytest.approx(seen["none"], rel=0.02)
    attention = told["many"].attention_flops - told["few"].attention_flops
    assert attention == pytest.approx(seen["many"] - seen["few"], rel=0.02)
    search = told["large"].search_flops - told["few"].search_flops
    assert search == pytest.approx(seen["large"] - seen["few"], rel=0.02)
    memory_part = seen["many"] - seen["none"]
    assert told["many"].memory_share > 1 / 3
    assert told["many"].memory_share * told["many"].flops == pytest.approx(memory_part, rel=0.02)
    assert told["many"].flops == pytest.approx(seen["many"], rel=0.02)
