"""What is logged of retrievals, against slow counts and cases worked out by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small import Scalars, fill_memory, logs, make_data, make_module, make_trainer, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memorizing_transformers.memory import Memory
from memorizing_transformers.memory.search import make_search
from memorizing_transformers.memory.search.auto import Choice
from memorizing_transformers.model import Retrieval
from memorizing_transformers.training.callbacks.retrieval import retrieval_recall, retrieved_ages
from memorizing_transformers.training.tensorboard import RunLogger

NOTHING = torch.zeros(0)


def test_the_age_of_what_was_retrieved() -> None:
    memory = fill_memory(2, 8, [8, 12])
    # Row 0 holds tokens 0..7 of steps 0 and 1; row 1 tokens 4..11 of steps 1 and 2, 8 in slot 0.
    slots = torch.tensor([[[[0, 7], [3, 0]]], [[[0, 1], [7, 7]]]])
    valid = torch.tensor([[[[True, True], [True, False]]], [[[True, False], [True, True]]]])
    retrieval = Retrieval(slots, valid, *[NOTHING] * 5, slots, valid)
    steps, tokens = retrieved_ages(memory, retrieval, step=3)
    # Row 0 retrieved tokens 0, 7 and 3; row 1 token 8 and twice token 7. The next are 8 and 12.
    assert steps.tolist() == [3 - 0, 3 - 1, 3 - 0, 3 - 2, 3 - 1, 3 - 1]
    assert tokens.tolist() == [8, 1, 5, 4, 5, 5]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_recall_is_the_share_of_the_true_neighbours(kv_heads: int) -> None:
    memory = Memory(2, kv_heads, 64, 8)
    memory.write(torch.randn(2, kv_heads, 50, 8), torch.randn(2, kv_heads, 50, 8))
    queries = torch.randn(2, 4, 12, 8)
    grouped = queries.reshape(2, kv_heads, -1, 8)
    slots, valid = (x.reshape(2, 4, 12, -1) for x in make_search("exact")(grouped, memory, 8))
    found = Retrieval(slots, valid, NOTHING, NOTHING, queries, NOTHING, NOTHING, slots, valid)
    assert retrieval_recall(memory, found) == 1.0
    last = make_search("exact")(-grouped, memory, 8).slots.reshape(2, 4, 12, -1)
    half = torch.cat([slots[..., :4], last[..., :4]], -1)
    assert retrieval_recall(memory, found._replace(searched=half)) == 0.5


def test_recall_is_measured_where_a_search_may_miss(texts: Path) -> None:
    name = "memory/recall/layer1"
    # In a memory as small as this one it misses nothing.
    assert {*watched(texts, steps=6, search="bucketed").values[name].values()} == {1.0}
    for search in ("exact", "faiss-flat", "auto"):
        assert name not in watched(texts, steps=6, search=search).values


def test_recall_follows_the_automatic_choice(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: Any) -> Choice:
        return Choice("bucketed", "for the test")

    monkeypatch.setattr("memorizing_transformers.memory.search.auto.choose_search", choose)
    assert watched(texts, steps=6, search="auto").values["memory/recall/layer1"]


def test_measuring_recall_asks_the_search_nothing(texts: Path) -> None:
    """An index may learn from what it is asked, so a measured run must not ask more."""
    asked = []
    for every in (0, 1):
        module, count = make_module(search="bucketed"), [0]
        module.configure_model_before = module.configure_model

        def build(module: Any = module, count: list[int] = count) -> None:
            module.configure_model_before()
            reader = module.net.readers()[1]
            search = reader.search

            def counted(*args: Any) -> Any:
                count[0] += 1
                return search(*args)

            reader.search = counted

        module.configure_model = build
        trainer = make_trainer(max_steps=6, logger=Scalars(), callbacks=logs(every))
        trainer.fit(module, datamodule=make_data(texts))
        asked.append(count[0])
    assert asked == [6, 6]


def test_logged_figures_are_those_of_a_slow_count(texts: Path) -> None:
    logger, expected = Scalars(), {}  # type: ignore[var-annotated]
    module = make_module(size=50)

    def count(batch: Any, bank: Any, output: Any) -> None:
        memory, retrieval, step = bank.memories[1], output.retrievals[1], module.global_step
        if step % 3:
            return
        ages = [
            step - memory.steps[row, slot].item()
            for row in range(4)
            for slot in range(min(50, memory.written[row].item()))
        ]
        gate = module.net.layers[1].attention.reader.gate.logit
        expected[step] = {
            "memory/fill/layer1": sum(min(50, w) for w in memory.written.tolist()) / 4 / 50,
            "memory/share/layer1": retrieval.share.mean().item(),
            "memory/stored_age_steps/layer1": sum(ages) / len(ages) if ages else None,
            "memory/gate/layer1_head0": torch.sigmoid(gate[0]).item(),
            "memory/gate/layer1_head1": torch.sigmoid(gate[1]).item(),
        }

    module.observers.append(count)
    options = {"max_steps": 30, "log_every_n_steps": 1, "callbacks": logs(3)}
    trainer = make_trainer(logger=logger, **options)
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


@pytest.mark.parametrize("combine", ["content", "joint"])
def test_shares_that_depend_on_the_token_are_logged_by_head(texts: Path, combine: str) -> None:
    scalars = watched(texts, steps=8, combine=combine).values
    for step, share in scalars["memory/share/layer1"].items():
        heads = [scalars[f"memory/share/layer1_head{head}"][step] for head in (0, 1)]
        assert sum(heads) / 2 == pytest.approx(share, rel=1e-5)
    assert not any("gate" in name for name in scalars)


def histograms(folder: Path) -> dict[str, dict[int, Any]]:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()["histograms"]
    return {tag: {e.step: e.histogram_value for e in events.Histograms(tag)} for tag in tags}


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_histograms_are_of_what_was_retrieved(texts: Path, tmp_path: Path, combine: str) -> None:
    module = make_module(combine=combine, size=48)
    expected: dict[int, Any] = {}

    def count(batch: Any, bank: Any, output: Any) -> None:
        found, memory = output.retrievals[1], bank.memories[1]
        if module.global_step % 3 == 0 and found.valid.any():
            ages = retrieved_ages(memory, found, module.global_step)
            expected[module.global_step] = [age.tolist() for age in ages]

    module.observers.append(count)
    logger = RunLogger(tmp_path, name="", version="run")
    trainer = make_trainer(max_steps=10, logger=logger, callbacks=logs(seldom=3))
    trainer.fit(module, datamodule=make_data(texts))
    drawn = histograms(tmp_path / "run")
    for index, unit in enumerate(("steps", "tokens")):
        found = drawn[f"memory/retrieved_age_{unit}_histogram/layer1"]
        assert found.keys() == expected.keys() == {3, 6, 9}
        for step, value in found.items():
            ages = expected[step][index]
            assert (value.num, value.sum) == (len(ages), pytest.approx(sum(ages)))
            assert (value.min, value.max) == (min(ages), max(ages))
    kind = "gate" if combine == "gate" else "share"
    shares = drawn[f"memory/{kind}_histogram/layer1"]
    assert all(0 <= value.min <= value.max <= 1 for value in shares.values())


def test_a_large_step_is_sampled_by_whole_tokens(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "memorizing_transformers.training.callbacks.retrieval.HISTOGRAM_PAIRS"
    monkeypatch.setattr(name, 4 * 2 * 4 * 5)  # five tokens of four rows, two heads, four pairs
    logger = RunLogger(tmp_path, name="", version="run")
    trainer = make_trainer(max_steps=6, logger=logger, callbacks=logs(seldom=5))
    trainer.fit(make_module(), datamodule=make_data(texts))
    drawn = histograms(tmp_path / "run")["memory/retrieved_age_steps_histogram/layer1"]
    assert 0 < drawn[5].num <= 4 * 2 * 4 * 5


def test_loggers_may_be_absent_or_several(texts: Path, tmp_path: Path) -> None:
    csv, board = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "plain")
    for loggers in (False, [csv, board, Scalars()]):
        module = make_module()
        options = {"limit_val_batches": 2, "val_check_interval": 4, "log_every_n_steps": 1}
        trainer = make_trainer(max_steps=8, logger=loggers, callbacks=logs(2, 2), **options)
        trainer.fit(module, datamodule=make_data(texts))
    for logger in loggers:
        logger.finalize("success")
    assert "memory/fill/layer1" in Path(csv.log_dir, "metrics.csv").read_text()
    assert histograms(Path(board.log_dir))
    assert loggers[-1].values["memory/gain_bits_per_token"]


def test_what_cannot_be_drawn_is_one_warning(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    for name in ("add_histogram", "add_text", "add_figure"):
        monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{name}", fail)
    module = make_module()
    options = {"limit_val_batches": 2, "val_check_interval": 4, "callbacks": logs(seldom=1)}
    trainer = make_trainer(max_steps=12, logger=RunLogger(tmp_path), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=make_data(texts))
    said = [str(warning.message) for warning in caught if "no space left" in str(warning.message)]
    assert len(said) == len({*said}) == 3
    assert trainer.global_step == 12
