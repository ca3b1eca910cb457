"""Loss by position, with memory and without: right, bounded, and in nobody's way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import pytest
import torch
from small import (
    SEGMENT,
    Scalars,
    assert_alike,
    by_hand,
    logs,
    make_data,
    make_module,
    make_trainer,
    state,
)

from memorizing_transformers.training.callbacks import LossByPosition
from memorizing_transformers.training.callbacks import loss_by_position as figures
from memorizing_transformers.training.callbacks.loss_by_position import PositionSums, draw
from memorizing_transformers.training.tensorboard import RunLogger

VALIDATING: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 6}


class Kept(LossByPosition):
    """Keeps what each validation measured."""

    def __init__(self, tokens: int = 131072) -> None:
        super().__init__(tokens)
        self.all: list[PositionSums] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if self._active:
            self.all.append(self._sums)


def test_positions_fall_into_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FEWEST", 1)
    sums = PositionSums()
    position = torch.tensor([1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20])
    sums.add(position, torch.ones(8), torch.arange(8.0))
    counts = {bin: int(n) for bin, n in enumerate(sums.sums[0]) if n}
    assert counts == {0: 1, 1: 2, 2: 2, 3: 1, 19: 1, 20: 1}
    middle, on, off = sums.curve()
    assert middle[:2] == pytest.approx([2**0.5, 2**1.5])
    assert on == [1.0] * 6
    assert off == [0.0, 1.5, 3.5, 5.0, 6.0, 7.0]
    monkeypatch.setattr(figures, "FEWEST", 2)
    assert sums.curve()[0] == middle[1:3]
    assert sums.gain == pytest.approx((28 - 8) / 8 / math.log(2))


@pytest.mark.parametrize(("xl_cache", "rows"), [(0, 4), (8, 1), (SEGMENT, 1), (SEGMENT, 2)])
def test_both_losses_are_those_of_two_runs_over_the_split(
    texts: Path, xl_cache: int, rows: int
) -> None:
    figure, logger = Kept(), Scalars()
    module, data = make_module(xl_cache=xl_cache), make_data(texts, eval_rows=rows)
    trainer = make_trainer(max_steps=6, logger=logger, callbacks=[figure], **VALIDATING)
    trainer.fit(module, datamodule=data)
    tokens, on, off = figure.all[-1].sums.sum(1).tolist()
    assert tokens == sum(len(data.validation_store.document(i)) - 1 for i in range(3))
    with_memory = by_hand(module.net, data.validation_store)["loss"]
    without = by_hand(module.net, data.validation_store, size=0)["loss"]
    assert on / tokens == pytest.approx(with_memory, rel=1e-5)
    assert off / tokens == pytest.approx(without, rel=1e-5)
    assert on != off
    (gain,) = logger.values["memory/gain_bits_per_token"].values()
    assert gain == pytest.approx((without - with_memory) / math.log(2), abs=1e-4)
    assert [*logger.values["memory/gain_bits_per_token"]] == [*logger.values["val/loss"]]


@pytest.mark.parametrize("tokens", [0, 1, 200, 600])
def test_no_more_is_read_twice_than_allowed(texts: Path, tokens: int) -> None:
    figure = Kept(tokens)
    module, data = make_module(), make_data(texts)
    trainer = make_trainer(max_steps=6, logger=Scalars(), callbacks=[figure], **VALIDATING)
    trainer.fit(module, datamodule=data)
    if not tokens:
        assert not figure.all
        return
    read = int(figure.all[0].sums[0].sum())
    assert 0 < read < tokens + SEGMENT
    # From its beginning on, the longest document first.
    longest = int(data.validation_store.lengths.max()) - 1
    bins = figure.all[0].sums[0]
    assert bins[0] == bins[1] / 2
    assert read >= min(tokens, longest)


@pytest.mark.parametrize("options", [{}, {"xl_cache": SEGMENT, "dropout": 0.1}])
def test_reading_twice_changes_nothing(texts: Path, tmp_path: Path, options: Any) -> None:
    outcomes = []
    for tokens in (0, 65536):
        logger = Scalars()
        module = make_module(**options)
        board = RunLogger(tmp_path, version=str(tokens))
        trainer = make_trainer(
            max_steps=12,
            logger=[logger, board],
            callbacks=[LossByPosition(tokens)],
            num_sanity_val_steps=2,
            **VALIDATING,
        )
        trainer.fit(module, datamodule=make_data(texts))
        logged = {k: v for k, v in logger.values.items() if k.startswith(("val/", "train/"))}
        outcomes.append((logged, state(module), torch.rand(3)))
        assert trainer.logged_metrics
    assert len(outcomes[0][0]["val/loss"]) == 2
    assert outcomes[0][0] == outcomes[1][0]
    assert_alike(outcomes[0][1], outcomes[1][1])
    assert torch.equal(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("settings", [{"layers": []}, {"size": 0}])
def test_without_memory_there_is_nothing_to_compare(texts: Path, settings: Any) -> None:
    figure = Kept()
    trainer = make_trainer(max_steps=6, logger=Scalars(), callbacks=[figure], **VALIDATING)
    trainer.fit(make_module(**settings), datamodule=make_data(texts))
    assert not figure.all


def test_a_figure_needs_no_display_and_leaves_nothing_open(texts: Path, tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, name="", version="run")
    module = make_module()
    options = {**VALIDATING, "num_sanity_val_steps": 1, "callbacks": logs(seldom=50)}
    trainer = make_trainer(max_steps=12, logger=logger, **options)
    trainer.fit(module, datamodule=make_data(texts))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Images("memory/loss_by_position")] == [6, 12]
    assert matplotlib.pyplot.get_fignums() == []


def test_the_figure_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FEWEST", 1)
    sums = PositionSums()
    sums.add(
        torch.tensor([1, 2, 1000]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.5, 2.0])
    )
    axes = draw(sums, segment=128, size=4096).axes[0]
    lines = {line.get_label(): [*line.get_ydata()] for line in axes.get_lines()}
    assert lines["memory on"] == [3.0, 2.0, 1.0]
    assert lines["memory off"] == [3.0, 2.5, 2.0]
    assert [text.get_text() for text in axes.texts] == ["one segment"]
