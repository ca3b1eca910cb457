"""Predictions of every token, in a file that others can read."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from lightning.pytorch import Callback
from small import Run, command, make_data, make_module, make_trainer, scalars

from memorizing_transformers.training.callbacks import PredictionWriter
from memorizing_transformers.training.runs import versions


@pytest.fixture(scope="module")
def records(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    code, out, _ = command("predict", "--config", run.config, "--ckpt_path", "last")
    assert code == 0
    path = run.root / "predict" / "version_0" / "predictions.parquet"
    assert f"predictions: {path}" in out
    cache = str(tmp_path_factory.mktemp("datasets"))
    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache).to_list()


def test_every_token_is_predicted_once_in_its_place(
    records: list[dict[str, Any]], texts: Path
) -> None:
    store = make_data(texts).test_store
    tokens: dict[str, list[int]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["position"]):
        assert record["position"] == 1 + len(tokens[record["document"]])
        tokens[record["document"]] += record["token"]
    assert tokens == {
        name: store.document(index).tolist()[1:] for index, name in enumerate(store.names)
    }


def test_losses_and_hits_add_up_to_the_tests_figures(
    records: list[dict[str, Any]], run: Run
) -> None:
    assert command("test", "--config", run.config, "--ckpt_path", "last")[0] == 0
    events = versions(run.root / "test")[-1]
    tested = {name: [*values.values()] for name, values in scalars(events).items()}
    losses = [loss for record in records for loss in record["loss"]]
    hits = [hit for record in records for hit in record["correct"]]
    mean = math.fsum(losses) / len(losses)
    assert tested["test/loss"] == [pytest.approx(mean, rel=1e-6)]
    assert tested["test/perplexity"] == [pytest.approx(math.exp(mean), rel=1e-6)]
    assert tested["test/accuracy"] == [pytest.approx(sum(hits) / len(hits), rel=1e-6)]


def test_another_split_can_be_predicted(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.parquet"
    data = make_data(texts, predict_split="validation")
    trainer = make_trainer(callbacks=[PredictionWriter(path)])
    trainer.predict(make_module(), datamodule=data, return_predictions=False)
    data_files, cache = str(path), str(tmp_path / "datasets")
    table = load_dataset("parquet", data_files=data_files, split="train", cache_dir=cache)
    assert set(table["document"]) == set(data.validation_store.names)


def test_a_run_that_fails_leaves_no_half_of_a_file(texts: Path, tmp_path: Path) -> None:
    class Fail(Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if args[2] == 2:
                assert [*tmp_path.iterdir()] == [tmp_path / ".predictions.parquet.partial"]
                raise RuntimeError("out of luck")

    path = tmp_path / "predictions.parquet"
    trainer = make_trainer(callbacks=[PredictionWriter(path), Fail()])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.predict(make_module(), datamodule=make_data(texts), return_predictions=False)
    assert [*tmp_path.iterdir()] == []
