"""Ages and drift against cases worked out by hand, and what is logged of them."""

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
    make_data,
    make_module,
    make_trainer,
    state,
)

from memorizing_transformers.memory import Memory
from memorizing_transformers.model import Retrieval, Transformer
from memorizing_transformers.training.callbacks.staleness import (
    key_drift,
    retrieved_age,
    sample_window,
)

STANDING_STILL = {"lr": 1e-30, "weight_decay": 0.0}


def fill(rows: int, size: int, written: list[int], segment: int = 4) -> Memory:
    """A memory after ``written`` tokens a row; token p of a row has id p and step p // segment."""
    memory = Memory(rows, 1, size, 2)
    for start in range(0, max(written), segment):
        mask = torch.arange(start, start + segment) < torch.tensor(written)[:, None]
        pairs = torch.zeros(rows, 1, segment, 2)
        ids = torch.arange(start, start + segment).expand(rows, -1)
        memory.write(pairs, pairs, mask, ids, step=start // segment)
    return memory


def test_the_age_of_what_was_retrieved() -> None:
    memory = fill(2, 8, [8, 12])
    # Row 0 holds tokens 0..7 of steps 0 and 1; row 1 tokens 4..11 of steps 1 and 2, 8 in slot 0.
    slots = torch.tensor([[[[0, 7], [3, 0]]], [[[0, 1], [7, 7]]]])
    valid = torch.tensor([[[[True, True], [True, False]]], [[[True, False], [True, True]]]])
    nothing = torch.zeros(0)
    retrieval = Retrieval(slots, valid, nothing, nothing, nothing)
    steps, tokens = retrieved_age(memory, retrieval, step=3)
    # Row 0 retrieved tokens 0, 7 and 3; row 1 token 8 and twice token 7. The next are 8 and 12.
    assert steps.item() == pytest.approx(((3 - 0) + (3 - 1) + (3 - 0) + (3 - 2) + 2 * (3 - 1)) / 6)
    assert tokens.item() == pytest.approx((8 + 1 + 5 + 4 + 2 * 5) / 6)


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
    memory = fill(len(written), size, written)
    window = sample_window(memory, segment=16)
    if expected is None:
        assert window is None
        return
    assert window is not None
    row, slots = window
    assert row == expected[0]
    assert memory.positions[row, slots].tolist() == list(range(expected[1], expected[1] + 16))


def watched(texts: Path, steps: int = 20, every: int = 1, **settings: Any) -> Scalars:
    """What a training run logs."""
    logger = Scalars()
    module = make_module(staleness_every_n_steps=every, **settings)
    trainer = make_trainer(max_steps=steps, logger=logger, log_every_n_steps=1)
    trainer.fit(module, datamodule=make_data(texts))
    return logger


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


def test_logged_figures_are_those_of_a_slow_count(texts: Path) -> None:
    logger, expected = Scalars(), {}  # type: ignore[var-annotated]
    module = make_module(staleness_every_n_steps=3, size=50)

    def count(batch: Any, bank: Any, output: Any) -> None:
        memory, retrieval, step = bank.memories[1], output.retrievals[1], module.global_step
        if step % 3:
            return
        ages = [
            step - memory.steps[row, slot].item()
            for row in range(4)
            for slot in range(min(50, memory.written[row].item()))
        ]
        gate = module.net.layers[1].attention.gate
        expected[step] = {
            "memory/fill/layer1": sum(min(50, w) for w in memory.written.tolist()) / 4 / 50,
            "memory/share/layer1": retrieval.share.mean().item(),
            "memory/stored_age_steps/layer1": sum(ages) / len(ages) if ages else None,
            "memory/gate/layer1_head0": torch.sigmoid(gate[0]).item(),
            "memory/gate/layer1_head1": torch.sigmoid(gate[1]).item(),
        }

    module.readers.append(count)
    trainer = make_trainer(max_steps=30, logger=logger, log_every_n_steps=1)
    trainer.fit(module, datamodule=make_data(texts))
    assert [*expected] == [*range(0, 30, 3)]
    for step, figures in expected.items():
        for name, value in figures.items():
            if value is None:
                assert step not in logger.values[name]
            elif "gate" in name:  # logged after the step has moved it
                assert logger.values[name][step] == pytest.approx(value, abs=0.02)
            else:
                assert logger.values[name][step] == pytest.approx(value, rel=1e-6)


def test_a_retrieved_pair_is_no_older_than_the_memory_holds(texts: Path) -> None:
    scalars = watched(texts, size=32).values
    tokens = scalars["memory/retrieved_age_tokens/layer1"].values()
    steps = scalars["memory/retrieved_age_steps/layer1"].values()
    assert all(1 <= age <= 32 for age in tokens)
    assert all(1 <= age <= 2 for age in steps)  # two segments fit


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_measuring_changes_nothing(texts: Path, options: dict[str, Any]) -> None:
    outcomes = []
    for every in (0, 1):
        module, losses = make_module(staleness_every_n_steps=every, dropout=0.1), Losses()
        trainer = make_trainer(max_steps=8, logger=Scalars(), callbacks=[losses], **options)
        trainer.fit(module, datamodule=make_data(texts))
        assert all(part.training for part in module.net.modules())
        outcomes.append((losses.values, state(module)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_alike(outcomes[0][1], outcomes[1][1])


def test_it_measures_as_often_as_told_and_never_at_zero(texts: Path) -> None:
    every = watched(texts, steps=10, every=4).values
    assert [*every["memory/fill/layer1"]] == [0, 4, 8]
    never = watched(texts, steps=3, every=0).values
    assert not any(name.startswith(("memory/", "staleness/")) for name in never)


def test_a_model_without_memory_logs_none(texts: Path) -> None:
    for settings in ({"size": 0}, {"layers": []}):
        scalars = watched(texts, steps=3, **settings).values
        assert "train/loss" in scalars
        assert not any(name.startswith(("memory/", "staleness/")) for name in scalars)


def test_every_memory_layer_is_logged(texts: Path) -> None:
    scalars = watched(texts, steps=6, layers=[0, 1]).values
    for layer in (0, 1):
        for name in ("memory/fill", "memory/retrieved_age_tokens", "staleness/key_cosine"):
            assert f"{name}/layer{layer}" in scalars


def test_a_part_that_was_frozen_stays_so(texts: Path) -> None:
    module = make_module(staleness_every_n_steps=1, vocab_size=256)
    module.net = Transformer(module.config)
    trainer = make_trainer(max_steps=3, logger=Scalars())
    module.net.layers[0].eval()
    trainer.fit(module, datamodule=make_data(texts))
    assert not module.net.layers[0].training
    assert module.net.layers[1].training
