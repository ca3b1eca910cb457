"""Drift against cases worked out by hand, and what is logged of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import (
    SEGMENT,
    Losses,
    Scalars,
    assert_alike,
    fill_memory,
    logs,
    make_data,
    make_module,
    make_trainer,
    state,
    watched,
)

from memorizing_transformers.memory import Memory
from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.training.callbacks.staleness import key_drift, sample_window
from memorizing_transformers.training.tensorboard import RunLogger

STANDING_STILL = {"lr": 1e-30, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("size", "written", "expected"),
    [
        (50, [40], (0, 0)),  # everything is there: the document's beginning
        (50, [16], (0, 0)),
        (50, [15], None),
        (50, [70], (0, 48)),  # from 20 on; the segment at 32 serves as cache
        (50, [60], (0, 32)),
        (40, [44], None),
        (32, [64], (0, 48)),
        (50, [40, 70, 16], (1, 48)),  # the fullest row
    ],
)
def test_the_sampled_window_is_the_oldest_whole_segment(
    size: int, written: list[int], expected: tuple[int, int] | None
) -> None:
    memory = fill_memory(len(written), size, written)
    window = sample_window(memory, segment=16)
    if expected is None:
        assert window is None
        return
    assert window is not None
    row, slots = window
    assert row == expected[0]
    assert memory.positions[row, slots].tolist() == list(range(expected[1], expected[1] + 16))


@pytest.mark.parametrize("xl_cache", [0, 8, SEGMENT])
@pytest.mark.parametrize("size", [32, 50, 1024])
def test_keys_do_not_drift_where_weights_stand_still(texts: Path, size: int, xl_cache: int) -> None:
    scalars = watched(texts, size=size, xl_cache=xl_cache, optimizer=STANDING_STILL).values
    cosines = scalars["staleness/key_cosine/layer1"].values()
    ratios = scalars["staleness/key_norm_ratio/layer1"].values()
    assert len(cosines) > 10
    assert [*cosines] == pytest.approx([1.0] * len(cosines), abs=1e-5)
    assert [*ratios] == pytest.approx([1.0] * len(ratios), abs=1e-5)


def test_norms_are_compared_where_keys_are_not_normalised(texts: Path) -> None:
    scalars = watched(texts, qk_norm=False, optimizer=STANDING_STILL).values
    ratios = scalars["staleness/key_norm_ratio/layer1"].values()
    assert [*ratios] == pytest.approx([1.0] * len(ratios), abs=1e-5)
    moving = watched(texts, qk_norm=False, optimizer={"lr": 0.1}).values
    ratios = moving["staleness/key_norm_ratio/layer1"].values()
    assert max(abs(ratio - 1) for ratio in ratios) > 0.05


def test_the_faster_weights_move_the_further_keys_drift(texts: Path) -> None:
    lowest = []
    for lr in (1e-4, 1e-2, 0.3):
        scalars = watched(texts, size=64, optimizer={"lr": lr}).values
        lowest.append(min(scalars["staleness/key_cosine/layer1"].values()))
    assert lowest[0] > 0.999
    assert lowest[0] > lowest[1] > lowest[2]
    assert lowest[2] < 0.9


def test_the_drift_is_of_the_very_tokens_in_the_window(texts: Path) -> None:
    net = Transformer(make_module(vocab_size=256, size=50).config).eval()
    bank = net.new_memory(1)
    tokens = torch.randint(0, 256, (1, 80))
    for step, ids in enumerate(tokens.split(SEGMENT, 1)):
        with torch.no_grad():
            bank.commit(net(ids, bank).pairs, token_ids=ids, step=step)
    drift = key_drift(net, bank, 1, SEGMENT)
    assert drift["key_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert drift["sample_step"] == 3.0  # tokens 48 to 63
    memory = bank.memories[1]
    memory.keys[0, :, torch.arange(48, 64) % 50] *= -2
    drift = key_drift(net, bank, 1, SEGMENT)
    assert drift["key_cosine"] == pytest.approx(-1.0, abs=1e-5)
    assert drift["key_norm_ratio"] == pytest.approx(2.0, abs=1e-5)


def test_the_window_is_found_in_a_memory_that_grew() -> None:
    grown = Memory(1, 1, 96, 2)
    grown.load(fill_memory(1, 64, [100]).tensors())  # it had lost tokens 0 to 35
    window = sample_window(grown, segment=16)
    assert window is not None
    assert grown.positions[0, window[1]].tolist() == [*range(64, 80)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_measuring_changes_nothing(texts: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    outcomes = []
    for every in (0, 1):
        board = RunLogger(tmp_path, version=str(every))
        module = make_module(dropout=0.1)
        losses = Losses()
        callbacks = [losses, *logs(every, every)]
        trainer = make_trainer(max_steps=8, logger=board, callbacks=callbacks, **options)
        trainer.fit(module, datamodule=make_data(texts))
        assert all(part.training for part in module.net.modules())
        outcomes.append((losses.values, state(module)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_alike(outcomes[0][1], outcomes[1][1])


def test_every_memory_layer_is_logged(texts: Path) -> None:
    scalars = watched(texts, steps=6, layers=[0, 1]).values
    for layer in (0, 1):
        for name in ("memory/fill", "memory/retrieved_age_tokens", "staleness/key_cosine"):
            assert f"{name}/layer{layer}" in scalars


def test_a_part_that_was_frozen_stays_so(texts: Path) -> None:
    module = make_module(vocab_size=256)
    module.net = Transformer(module.config)
    trainer = make_trainer(max_steps=3, logger=Scalars(), callbacks=logs(1))
    module.net.layers[0].eval()
    trainer.fit(module, datamodule=make_data(texts))
    assert not module.net.layers[0].training
    assert module.net.layers[1].training


@pytest.mark.parametrize("xl_cache", [0, 8])
def test_the_probe_computes_no_logits_and_no_layer_above_the_memory(xl_cache: int) -> None:
    """A compiled model would compile a whole graph for its one row."""
    memory = {"size": 64, "top_k": 2, "layers": [1]}
    net = Transformer(ModelConfig(23, 16, 3, 2, xl_cache=xl_cache, memory=memory))
    bank, ids = net.new_memory(2), torch.randint(23, (2, SEGMENT))
    with torch.no_grad():
        for _ in range(2):
            bank.commit(net(ids, bank).pairs, token_ids=ids)
    called: list[str] = []
    for name, part in (("network", net), ("layer above", net.layers[2])):
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    drift = key_drift(net, bank, 1, SEGMENT)
    assert drift["key_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert not called
