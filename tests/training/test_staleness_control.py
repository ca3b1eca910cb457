"""Refreshing and dropping in training: when, in which bank, and with which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import SEGMENT, Losses, assert_alike, make_data, make_module, make_trainer, state

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.memory.refresh import oldest_drift
from memorizing_transformers.training.callbacks import MemoryClearing, staleness_control
from memorizing_transformers.training.callbacks.staleness_control import StalenessControl

FAST = {"lr": 0.3}
CONTROLS: list[dict[str, Any]] = [
    {"refresh_every_n_steps": 2},
    {"drop_after_n_steps": 2},
    {"drop_below_cosine": 0.9},
]


def watched(
    texts: Path, see: Any, steps: int = 12, options: dict[str, Any] | None = None, **settings: Any
) -> None:
    """Train and let ``see(module, batch, bank)`` look between read and commit."""
    module = make_module(**{"size": 50, "optimizer": FAST, **settings})
    module.observers.append(lambda batch, bank, output: see(module, batch, bank))
    make_trainer(max_steps=steps, **(options or {})).fit(module, datamodule=make_data(texts))


def read_again(module: Any, texts: Path, batch: Any) -> list[torch.Tensor]:
    """The keys of each row's whole document so far, by today's weights."""
    store, keys = make_data(texts).train_store, []
    modes = [part.training for part in module.net.modules()]
    module.net.eval()
    for document, position in zip(batch.document.tolist(), batch.position.tolist(), strict=True):
        tokens = torch.from_numpy(store.document(document).astype("int64"))[None, :position]
        bank, own = module.net.new_memory(1), []
        for ids in tokens.split(SEGMENT, 1) if position else ():
            with torch.no_grad():
                pairs = module.net(ids, bank).pairs
            bank.commit(pairs)
            own.append(pairs.memory[max(pairs.memory)][0][0])
        keys.append(torch.cat(own, 1) if own else torch.zeros(2, 0, 8))
    for part, mode in zip(module.net.modules(), modes, strict=True):
        part.training = mode
    return keys


@pytest.mark.parametrize("xl_cache", [0, 16])
def test_refreshed_keys_are_those_of_todays_weights(texts: Path, xl_cache: int) -> None:
    compared = {True: 0, False: 0}

    def see(module: Any, batch: Any, bank: Any) -> None:
        memory, step = bank.memories[1], module.global_step
        fresh = read_again(module, texts, batch)
        for row in range(4):
            written, fill = int(memory.written[row]), int(memory.fill[row])
            first = -(-(written - fill) // SEGMENT) * SEGMENT + (xl_cache if written > fill else 0)
            numbers = torch.arange(first, written)
            if not len(numbers):
                continue
            stored = memory.keys[row][:, numbers % memory.size]
            same = torch.allclose(stored, fresh[row][:, first:], rtol=1e-3, atol=1e-4)
            steps = memory.steps[row, numbers % memory.size]
            assert same == (step % 3 == 0)
            assert bool((steps == step).all()) == (step % 3 == 0)
            compared[same] += 1

    watched(texts, see, refresh_every_n_steps=3, xl_cache=xl_cache, dropout=0.1)
    assert min(compared.values()) > 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_older_than_told_is_retrieved(texts: Path, accumulate: int) -> None:
    oldest = []

    def see(module: Any, batch: Any, bank: Any) -> None:
        memory, step = bank.memories[1], module.global_step
        ages = step - memory.steps[memory.valid()]
        if len(ages):
            oldest.append(int(ages.max()))
        # Nothing younger was dropped, and what was dropped is as old as told.
        in_use = torch.arange(memory.size) < memory.used[:, None]
        assert (step - memory.steps[in_use & ~memory.valid()] > 2).all()

    options = {"accumulate_grad_batches": accumulate}
    watched(texts, see, size=200, drop_after_n_steps=2, options=options)
    assert max(oldest) == 2


def test_what_has_drifted_is_dropped_and_only_with_the_fast_weights(texts: Path) -> None:
    dropped = {1e-5: 0, 0.3: 0}
    for lr in dropped:

        def see(module: Any, batch: Any, bank: Any, lr: float = lr) -> None:
            memory = bank.memories[1]
            if module.global_step % 8 == 0:
                cosine, _ = oldest_drift(module.net.encode, bank, SEGMENT)
                assert (cosine >= 0.9).all()
            dropped[lr] += int((memory.used - memory.fill).sum())

        watched(texts, see, steps=20, size=200, optimizer={"lr": lr}, drop_below_cosine=0.9)
    assert dropped[1e-5] == 0
    assert dropped[0.3] > 0


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: next(iter(control)))
def test_it_acts_once_a_step_before_the_first_batch(
    control: dict[str, Any], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three batches a step, and a last step of an epoch that has fewer."""
    acted: list[tuple[int, int]] = []

    class Watching(StalenessControl):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, idx: int) -> None:
            memory = pl_module.banks["train"].memories[1]
            before = memory.oldest.clone(), memory.steps.clone(), memory.keys.clone()
            super().on_train_batch_start(trainer, pl_module, batch, idx)
            after = memory.oldest, memory.steps, memory.keys
            if not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
                acted.append((pl_module.global_step, idx))

    module = make_module(size=200, optimizer=FAST, **control)
    options = {"accumulate_grad_batches": 3, "limit_train_batches": 7, "max_steps": 12}
    callbacks = [MemoryClearing(), Watching(check_every_n_steps=1)]
    make_trainer(callbacks=callbacks, **options).fit(module, datamodule=make_data(texts))
    assert len(acted) > 2
    assert len({step for step, _ in acted}) == len(acted)
    assert all(index % 3 == 0 for _, index in acted)
    if "refresh_every_n_steps" in control:
        assert all(step % 2 == 0 for step, _ in acted)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: next(iter(control)))
def test_with_weights_that_stand_still_only_steps_change(
    control: dict[str, Any], texts: Path
) -> None:
    """Nor does it touch random states, modes or gradients: dropout falls as it would."""
    outcomes = []
    for settings in ({}, control):
        module, losses = make_module(dropout=0.0, xl_cache=16, size=32, **settings), Losses()
        module.optimizer_config.lr = 1e-30
        module.optimizer_config.weight_decay = 0.0
        trainer = make_trainer(max_steps=8, callbacks=[losses])
        trainer.fit(module, datamodule=make_data(texts))
        assert all(part.training for part in module.net.modules())
        outcomes.append((losses.values, state(module), torch.get_rng_state()))
    (losses_off, off, rng_off), (losses_on, on, rng_on) = outcomes
    assert torch.equal(rng_on, rng_off)
    if "drop_after_n_steps" not in control:
        torch.testing.assert_close(losses_on, losses_off)
    for name, tensor in off.items():
        if not name.endswith(("steps", "oldest")):
            torch.testing.assert_close(on[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_random_states_and_modes_are_left_alone(texts: Path) -> None:
    module = make_module(size=200, dropout=0.5, refresh_every_n_steps=1, drop_below_cosine=0.9)
    seen: list[bool] = []

    class Watching(StalenessControl):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, idx: int) -> None:
            pl_module.net.layers[0].eval()
            grads = [None if p.grad is None else p.grad.clone() for p in pl_module.net.parameters()]
            before = torch.get_rng_state()
            super().on_train_batch_start(trainer, pl_module, batch, idx)
            seen.append(torch.equal(before, torch.get_rng_state()))
            assert not pl_module.net.layers[0].training
            assert pl_module.net.layers[1].training
            for grad, parameter in zip(grads, pl_module.net.parameters(), strict=True):
                assert grad is parameter.grad is None or torch.equal(grad, parameter.grad)

    trainer = make_trainer(max_steps=9, callbacks=[MemoryClearing(), Watching(1)])
    trainer.fit(module, datamodule=make_data(texts))
    assert seen == [True] * 9


def test_evaluation_is_the_same_with_and_without(texts: Path) -> None:
    module = make_module(size=100)
    trainer = make_trainer(max_steps=4)
    trainer.fit(module, datamodule=make_data(texts))
    figures = []
    for on in (False, True):
        if on:
            module.config.memory.refresh_every_n_steps = 1
            module.config.memory.drop_after_n_steps = 1
            module.config.memory.drop_below_cosine = 0.99
        tester = make_trainer(limit_val_batches=1.0)
        figures += tester.validate(module, datamodule=make_data(texts), verbose=False)
    assert figures[0] == figures[1]


def test_under_bf16_it_encodes_as_the_step_does(texts: Path) -> None:
    differences = []

    def see(module: Any, batch: Any, bank: Any) -> None:
        memory = bank.memories[1]
        if module.global_step:
            last = memory.steps == module.global_step
            differences.append(bool((memory.keys.transpose(1, 2)[last & memory.valid()]).any()))
            keys = memory.keys.transpose(1, 2)[memory.valid()]
            assert torch.equal(keys, keys.bfloat16().float())

    options = {"precision": "bf16-mixed"}
    watched(texts, see, refresh_every_n_steps=1, qk_norm=False, steps=5, options=options)
    assert any(differences)


@pytest.mark.parametrize(
    ("key", "value"),
    [("refresh_every_n_steps", -1), ("drop_after_n_steps", -2), ("drop_below_cosine", 1.5)],
)
def test_what_cannot_work_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"model.memory.{key} = {value}"):
        make_module(**{key: value})


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: next(iter(control)))
def test_sharded_weights_cannot_encode_by_rank(
    control: dict[str, Any], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staleness_control, "is_sharded", lambda net: True)
    trainer, module = make_trainer(max_steps=1), make_module(**control)
    if "drop_after_n_steps" in control:
        trainer.fit(module, datamodule=make_data(texts))
        return
    with pytest.raises(ConfigError, match=r"drop_after_n_steps does"):
        trainer.fit(module, datamodule=make_data(texts))


def test_a_model_without_memory_has_nothing_to_control(texts: Path) -> None:
    outcomes = []
    for settings in ({}, {"refresh_every_n_steps": 1, "drop_below_cosine": 0.5}):
        module = make_module(size=0, **settings)
        make_trainer(max_steps=3).fit(module, datamodule=make_data(texts))
        outcomes.append(state(module))
    assert_alike(*outcomes)
