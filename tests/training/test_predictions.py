"""Predictions of every token, in a file that others can read."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from lightning.pytorch import Callback
from small import SEGMENT, Run, command, make_data, make_module, make_trainer, scalars

from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.training.callbacks import PredictionWriter
from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.run_folders import versions


def read(files: str, cache: Path) -> list[dict[str, Any]]:
    """What the files of a pattern hold, as the README reads them."""
    cache_dir = str(cache)
    return load_dataset("parquet", data_files=files, split="train", cache_dir=cache_dir).to_list()


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    """A folder that ``predict`` wrote."""
    code, out, _ = command("predict", "--config", run.config, "--ckpt_path", "last")
    assert code == 0
    folder = run.root / "predict" / "version_0"
    for name in ("predictions", "documents"):
        assert f"{name}: {folder / name}.parquet" in out
    return folder


@pytest.fixture(scope="module")
def records(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return read(f"{folder}/predictions*.parquet", tmp_path_factory.mktemp("datasets"))


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


def test_documents_have_the_figures_of_their_tokens(
    records: list[dict[str, Any]], folder: Path, texts: Path, tmp_path: Path
) -> None:
    store = make_data(texts).test_store
    documents = read(f"{folder}/documents*.parquet", tmp_path)
    assert sorted(document["document"] for document in documents) == sorted(store.names)
    for document in documents:
        own = [record for record in records if record["document"] == document["document"]]
        losses = [loss for record in own for loss in record["loss"]]
        hits = [hit for record in own for hit in record["correct"]]
        shares = [share for record in own for share in record["layer1_share"]]
        size = store.lengths[store.names.index(document["document"])]
        mean = math.fsum(losses) / len(losses)
        assert document == {
            "document": document["document"],
            "tokens": size - 1,
            "loss": pytest.approx(mean),
            "perplexity": pytest.approx(math.exp(mean)),
            "bits_per_byte": pytest.approx(mean / math.log(2)),  # a byte a token
            "accuracy": pytest.approx(sum(hits) / len(hits)),
            "layer1_share": pytest.approx(math.fsum(shares) / len(shares)),
        }


def test_best_neighbours_are_those_of_a_plain_loop(
    records: list[dict[str, Any]], run: Run, texts: Path
) -> None:
    """Each document alone, each token and head by hand."""
    net, store = load_model(run.checkpoint, memory={"size": 32}), make_data(texts).test_store
    by_place = {(record["document"], record["position"]): record for record in records}
    for index, name in enumerate(store.names):
        bank = net.new_memory(1)
        document = torch.from_numpy(store.document(index).astype("int64"))[None]
        for ids in document[:, :-1].split(SEGMENT, 1):
            start = int(bank.memories[1].written)
            with torch.no_grad():
                output = net(ids, bank)
            found, memory = output.retrievals[1], bank.memories[1]
            record = by_place[name, start + 1]
            for token in range(ids.shape[1]):
                candidates = [(0.0, -1, -1)]
                for head, rank in itertools.product(range(2), range(4)):
                    if found.valid[0, head, token, rank]:
                        part = found.weights[0, head, token, rank] * found.share[0, head, token]
                        place = memory.positions[0, found.slots[0, head, token, rank]]
                        candidates.append((float(part), head, int(place)))
                weight, head, place = max(candidates)
                assert record["layer1_weight"][token] == pytest.approx(weight, rel=1e-4, abs=1e-6)
                share = found.share[0, :, token].mean().item()
                assert record["layer1_share"][token] == pytest.approx(share, rel=1e-4)
                if sum(part > 0.999 * weight for part, *_ in candidates) > 1:
                    continue  # two that weigh alike
                assert record["layer1_head"][token] == head
                assert record["layer1_neighbour"][token] == place
                distance = start + token - place if head >= 0 else -1
                assert record["layer1_distance"][token] == distance
            bank.commit(output.pairs, token_ids=ids)


def test_without_memory_there_are_no_neighbours(texts: Path, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[PredictionWriter(tmp_path / "predictions.parquet")])
    trainer.predict(make_module(size=0), datamodule=make_data(texts), return_predictions=False)
    for name in ("predictions", "documents"):
        assert not any(
            "layer" in column for column in read(f"{tmp_path}/{name}.parquet", tmp_path / name)[0]
        )


def test_every_rank_writes_its_part(texts: Path, tmp_path: Path) -> None:
    """Two ranks of two rows each, one after the other; together they are one rank of four."""
    data = make_data(texts)
    for rank in (0, 1):
        writer = PredictionWriter(tmp_path / "predictions.parquet")
        module, trainer = make_module(), make_trainer(callbacks=[writer])
        share = SegmentLoader(data.test_store, data.plan("test"), rank, world_size=2)
        data.predict_dataloader = lambda share=share: share
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(trainer), "global_rank", rank)
            trainer.predict(module, datamodule=data, return_predictions=False)
    names = {path.name for path in tmp_path.glob("*.parquet")}
    assert names == {
        f"{name}{part}.parquet" for name in ("predictions", "documents") for part in ("", ".rank-1")
    }
    documents = read(f"{tmp_path}/documents*.parquet", tmp_path / "cache")
    assert sorted(d["document"] for d in documents) == sorted(data.test_store.names)


def test_another_split_can_be_predicted(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.parquet"
    data = make_data(texts, predict_split="validation")
    trainer = make_trainer(callbacks=[PredictionWriter(path)])
    trainer.predict(make_module(), datamodule=data, return_predictions=False)
    named = {record["document"] for record in read(str(path), tmp_path / "datasets")}
    assert named == set(data.validation_store.names)


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
