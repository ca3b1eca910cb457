"""No row reads a document's memory in the next one, and nobody trains without clearing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import SEGMENT, make_data, make_module, make_trainer

from memorizing_transformers.errors import UserError
from memorizing_transformers.training.callbacks import (
    MemoryClearing,
    StalenessControl,
    StalenessLogging,
)
from memorizing_transformers.training.module import MemorizingLM


class Careless(MemorizingLM):
    """Forgets to bring the clearing."""

    def configure_callbacks(self) -> list[Callback]:
        return [c for c in super().configure_callbacks() if not isinstance(c, MemoryClearing)]


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_without_clearing_nothing_starts(texts: Path, stage: str) -> None:
    trainer = make_trainer(limit_val_batches=1.0)
    with pytest.raises(UserError) as caught:
        getattr(trainer, stage)(make_module(Careless), datamodule=make_data(texts))
    message = str(caught.value)
    assert "MemoryClearing" in message
    assert "\n" not in message
    assert trainer.global_step == 0


def test_a_trainer_that_clears_by_itself_is_enough(texts: Path) -> None:
    trainer = make_trainer(max_steps=2, callbacks=[MemoryClearing()])
    trainer.fit(make_module(Careless), datamodule=make_data(texts))
    assert trainer.global_step == 2


class OwnClearing(MemoryClearing):
    """A user's own, which does more."""


def test_callbacks_of_the_users_own_replace_the_modules(texts: Path) -> None:
    trainer = make_trainer(max_steps=1, callbacks=[OwnClearing()])
    for _ in range(2):  # the second run finds those of the first
        trainer.fit(make_module(refresh_every_n_steps=4), datamodule=make_data(texts))
        kinds = [type(callback) for callback in trainer.callbacks]
        for kind in (OwnClearing, StalenessLogging, StalenessControl):
            assert kinds.count(kind) == 1
        assert MemoryClearing not in kinds


@pytest.mark.parametrize(
    "control",
    [{}, {"refresh_every_n_steps": 2}, {"drop_after_n_steps": 2}, {"drop_below_cosine": 0.5}],
)
def test_staleness_is_controlled_where_a_key_asks_for_it(texts: Path, control: Any) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(**control), datamodule=make_data(texts))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert {MemoryClearing, StalenessLogging} <= {*kinds}
    assert (StalenessControl in kinds) == bool(control)


class Strict(MemorizingLM):
    """Compares, before every read, the bank with what the row has read of its document."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.begun: dict[str, int] = {}
        """By stage, how many documents were begun."""
        self.went_on = 0

    def read(self, stage: str, batch: Any) -> Any:
        for memory in self.banks[stage].memories.values():
            assert torch.equal(memory.written, batch.position)
            assert torch.equal(memory.valid().any(1), ~batch.reset)
        for cache in self.banks[stage].caches.values():
            assert torch.equal(cache.length, batch.position.clamp(max=SEGMENT))
        rows = batch.document >= 0
        self.begun[stage] = self.begun.get(stage, 0) + int((batch.reset & rows).sum())
        self.went_on += int((~batch.reset).sum())
        return super().read(stage, batch)


@pytest.mark.parametrize("size", [32, 50])
def test_each_training_step_finds_its_own_document_alone(texts: Path, size: int) -> None:
    module, data = make_module(Strict, size=size, xl_cache=SEGMENT), make_data(texts)
    # Two epochs: documents run on over the end of the first.
    trainer = make_trainer(max_steps=-1, max_epochs=2, limit_train_batches=25)
    trainer.fit(module, datamodule=data)
    assert module.begun["train"] > len(data.train_store)
    assert module.went_on > 0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_each_evaluation_step_finds_its_own_document_alone(texts: Path, stage: str) -> None:
    module = make_module(Strict, xl_cache=SEGMENT)
    data = make_data(texts, eval_rows=2)
    trainer = make_trainer(limit_val_batches=1.0)
    for _ in range(2):
        getattr(trainer, stage)(module, datamodule=data)
    store = data.validation_store if stage == "validate" else data.test_store
    assert module.begun == {stage: 2 * len(store)}
    assert module.went_on > 0


def test_a_limited_evaluation_leaves_nothing_behind(texts: Path) -> None:
    # Stopped in the middle of documents: the next one must not begin with their memory.
    module, data = make_module(Strict), make_data(texts, eval_rows=2)
    trainer = make_trainer(
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=2,
    )
    trainer.fit(module, datamodule=data)
    assert module.begun["validate"] == 4 * 2
    assert set(module.banks) == {"train"}


def test_each_stage_has_a_bank_of_its_own(texts: Path) -> None:
    held: list[set[str]] = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            held.append(set(module.banks))
            stores = [*module.banks.values()]
            tensors = [id(t) for bank in stores for t in bank.tensors().values()]
            assert len(tensors) == len(set(tensors))

    trainer = make_trainer(
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        callbacks=[Watch()],
    )
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert held == [{"train", "validate"}] * 2
