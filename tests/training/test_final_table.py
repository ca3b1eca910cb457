"""The final table: the same weights with and without memory, beside the run and not in its way."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from small import Run, Scalars, by_hand, make_data, make_module, make_trainer, scalars, state

from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.final_table import METRICS, evaluate


@pytest.fixture
def report(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "report.json").read_text())


def test_rows_are_the_checkpoints_weights_with_and_without_memory(
    run: Run, report: dict[str, Any], texts: Path
) -> None:
    data = make_data(texts)
    expected = []
    for split in ("validation", "test"):
        for size in (32, 0):
            net = load_model(run.checkpoint, memory={"size": size})
            figures = by_hand(net, getattr(data, f"{split}_store"))
            row = {name: pytest.approx(figures[name], rel=1e-5) for name in METRICS}
            expected.append({"split": split, "memory": size, **row})
    assert report["rows"] == expected
    on, off = report["rows"][2:]
    assert on["perplexity"] != off["perplexity"]


def test_the_table_says_the_same_and_where_to_look(run: Run, report: dict[str, Any]) -> None:
    for row in report["rows"]:
        size = row["memory"] or "off"
        figures = rf"{row['perplexity']:.3f}\D+{row['bits_per_byte']:.4f}\D+{row['accuracy']:.4f}"
        assert re.search(rf"{row['split']}\W+{size}\W+{figures}", run.output)
    assert f"checkpoint: {run.checkpoint}\n" in run.output
    assert f"tensorboard --logdir {run.root}\n" in run.output
    speed = f"{report['tokens_per_second']:,.0f} tokens/s"
    assert speed in run.output
    assert report["tokens_per_second"] > 0 < report["seconds"]


def test_the_runs_curves_know_nothing_of_the_report(run: Run, report: dict[str, Any]) -> None:
    curves = scalars(run.folder)
    assert [*curves["val/perplexity"]] == [7, 15, 23]
    assert curves["val/perplexity"][23] == pytest.approx(report["rows"][0]["perplexity"])
    assert not any(name.startswith("test/") for name in curves)


def test_the_report_leaves_the_module_as_it_was(texts: Path) -> None:
    module, data = make_module(), make_data(texts)
    logger = Scalars()
    trainer = make_trainer(max_steps=3, limit_val_batches=1.0, logger=logger)
    trainer.fit(module, datamodule=data)
    before, logged = state(module), deepcopy(logger.values)
    rows = evaluate(trainer, module, data)
    assert [(row["split"], row["memory"]) for row in rows] == [
        ("validation", 32),
        ("validation", 0),
        ("test", 32),
        ("test", 0),
    ]
    assert module.config.memory.size == module.net.config.memory.size == 32
    assert trainer.loggers == [logger]
    assert logger.values == logged
    for name, weight in module.state_dict().items():
        assert weight.equal(before[name])


@pytest.mark.parametrize("settings", [{"layers": []}, {"size": 0}])
def test_a_model_without_memory_has_one_row_a_split(texts: Path, settings: Any) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=1)
    module, data = make_module(**settings), make_data(texts)
    trainer.fit(module, datamodule=data)
    rows = evaluate(trainer, module, data)
    assert [(row["split"], row["memory"]) for row in rows] == [("validation", 0), ("test", 0)]


@pytest.mark.parametrize(
    ("options", "limits", "splits"),
    [
        ({"validation_fraction": 0.0}, {}, ["test"]),
        ({"test_fraction": 0.0}, {}, ["validation"]),
        ({}, {"limit_val_batches": 0}, ["test"]),
        ({}, {"limit_test_batches": 0}, ["validation"]),
        ({"validation_fraction": 0.0, "test_fraction": 0.0}, {}, []),
    ],
)
def test_splits_that_are_not_there_are_left_out(
    texts: Path, options: dict[str, Any], limits: dict[str, Any], splits: list[str]
) -> None:
    trainer = make_trainer(max_steps=1, **{"limit_val_batches": 1, **limits})
    module, data = make_module(), make_data(texts, **options)
    trainer.fit(module, datamodule=data)
    rows = evaluate(trainer, module, data)
    assert [row["split"] for row in rows] == [split for split in splits for _ in range(2)]
