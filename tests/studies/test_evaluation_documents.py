"""What an evaluation keeps of each document, and how it measures time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from small import make_data
from torch import Tensor

from memorizing_studies.ablation import evaluation
from memorizing_studies.ablation.evaluation import RECALL_EVERY, Evaluation, MeasuredSearch
from memorizing_transformers.data.batch import IGNORE_INDEX, Batch
from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.callbacks import timing

TEXTS = {"a": "the first of them, " * 9, "b": "another one ", "c": "x", "d": "short and long " * 5}
LENGTHS = {name: len(text) for name, text in TEXTS.items()}


def losses(batch: Batch) -> Tensor:
    """A loss that depends on the target only."""
    return torch.where(batch.targets == IGNORE_INDEX, 0, batch.targets / 64).float()


@pytest.fixture
def documents(tmp_path: Path) -> Any:
    """A function that reads texts in rows and segments and returns the sums by name."""

    def read(texts: dict[str, str], rows: int, segment: int) -> dict[str, list[float]]:
        folder = tmp_path / f"texts{len([*tmp_path.iterdir()])}"
        (folder / "test").mkdir(parents=True)
        (folder / "train.txt").write_text("words " * 50)
        for name, text in texts.items():
            (folder / "test" / f"{name}.txt").write_text(text)
        (folder / "validation.txt").write_text("other words " * 50)
        source, held_out = str(folder / "train.txt"), str(folder / "validation.txt")
        options = {"validation_source": held_out, "test_source": str(folder / "test")}
        shape = {"batch_rows": rows, "segment_length": segment}
        own = {"cache_dir": str(folder / "cache"), **options, **shape}
        data = make_data(Path(source), validation_fraction=0.0, test_fraction=0.0, **own)
        data.prepare_data()
        data.setup()
        measuring, module = Evaluation(Path()), SimpleNamespace(device=torch.device("cpu"))
        for index, batch in enumerate(data.test_dataloader()):
            measuring.on_test_batch_start(None, module, batch, index)
            measuring.on_test_batch_end(None, module, {"nll": losses(batch)}, batch, index)
        names = data.test_store.names
        return {Path(names[i]).stem: sums for i, sums in measuring.documents.items()}

    return read


def checksums(read: dict[str, list[float]]) -> dict[str, float]:
    return {name: sums[2] for name, sums in read.items()}


def test_sums_and_checksums_do_not_depend_on_rows_and_segments(documents: Any) -> None:
    found = [documents(TEXTS, rows, segment) for rows, segment in ((1, 16), (4, 5), (2, 200))]
    for one in found:
        assert checksums(one) == checksums(found[0])
        # All tokens but the first are predicted, so a text of one token has no loss.
        for name, length in LENGTHS.items():
            expected = [length - 1, sum(ord(char) for char in TEXTS[name][1:]) / 64]
            assert one.get(name, [0, 0.0])[:2] == pytest.approx(expected)


def test_checksums_depend_on_every_token(documents: Any) -> None:
    before = checksums(documents(TEXTS, 4, 16))
    assert len({*before.values()}) == len(before)
    last = LENGTHS["a"] - 1
    for place in (0, 1, 15, 16, 17, 80, last - 1, last):
        text = TEXTS["a"]
        other = checksums(documents({**TEXTS, "a": text[:place] + "Q" + text[place + 1 :]}, 4, 16))
        assert {name for name in before if before[name] != other[name]} == {"a"}, place
    # The same tokens in another order.
    swapped = TEXTS["a"][:3] + TEXTS["a"][4] + TEXTS["a"][3] + TEXTS["a"][5:]
    assert checksums(documents({**TEXTS, "a": swapped}, 4, 16))["a"] != before["a"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(evaluation, "time", fake)
    return now


def filled(pairs: int, seed: int = 0) -> Memory:
    memory = Memory(1, 1, 64, 8)
    keys = torch.randn(1, 1, pairs, 8, generator=torch.Generator().manual_seed(seed))
    memory.write(keys, keys)
    return memory


def test_time_excludes_the_measurement_of_recall(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes 3 seconds, 2 of them in two searches. Measuring recall takes 100."""

    def search(queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        clock.seconds += 1
        return ExactSearch()(queries, memory, top_k)

    def recall(*args: Any) -> float:
        clock.seconds += 100
        return 0.5

    monkeypatch.setattr(evaluation, "measured_recall", recall)
    monkeypatch.setattr(evaluation, "load_weights", MagicMock())
    settings = MemoryConfig(size=64, top_k=4, layers=[0, 1])
    net = Transformer(ModelConfig(16, d_model=8, num_layers=2, num_heads=1, memory=settings))
    for reader in net.readers().values():
        reader.search = search
    module, measuring = SimpleNamespace(device=torch.device("cpu"), net=net), Evaluation(Path())
    measuring.on_test_start(MagicMock(), module)
    targets = torch.tensor([[3, 4, IGNORE_INDEX]])
    for index in range(10):
        none = torch.zeros(1, dtype=torch.long)
        batch = Batch(targets, targets, none.bool(), none + index // 4, none, none, none + 1)
        measuring.on_test_batch_start(None, module, batch, index)
        clock.seconds += 1
        for reader in net.readers().values():
            reader.search(torch.randn(1, 1, 3, 8), filled(8), 4)
        measuring.on_test_batch_end(None, module, {"nll": torch.ones(1, 3)}, batch, index)
        clock.seconds += 1000
    assert measuring.figures() == pytest.approx(
        {
            "tokens": 20,
            "eval_tokens_per_second": 20 / 30,
            "eval_step_ms": 3000,
            "eval_search_ms": 2000,
            "recall": 0.5,
        }
    )


@pytest.mark.parametrize("calls", [1, RECALL_EVERY, RECALL_EVERY + 1, 3 * RECALL_EVERY])
def test_recall_is_measured_at_one_of_sixteen_searches_that_can_miss(calls: int) -> None:
    measured = MeasuredSearch(ExactSearch())
    queries, top_k = torch.randn(1, 1, 5, 8), 4
    for _ in range(5):
        # As many pairs as neighbours: every search finds all of them.
        measured(queries, filled(top_k), top_k)
    assert measured.recalls == []
    for _ in range(calls):
        measured(queries, filled(top_k + 1), top_k)
    assert measured.recalls == [1.0] * -(-calls // RECALL_EVERY)


@pytest.mark.parametrize("queries", [1, 5, 16, 100])
def test_recall_samples_queries_of_the_complete_segment(queries: int) -> None:
    asked, memory = torch.randn(1, 1, queries, 8), filled(40)
    for missed in (0, queries - 1, slice(queries // 2, None)):

        def search(queries: Tensor, memory: Memory, top_k: int, missed: Any = missed) -> Neighbours:
            slots, valid = ExactSearch()(queries, memory, top_k)
            valid[:, :, missed] = False
            return Neighbours(slots, valid)

        measured = MeasuredSearch(search)
        measured(asked, memory, 4)
        misses = torch.zeros(queries)
        misses[missed] = 1
        assert measured.recalls == [pytest.approx(1 - float(misses.mean()), abs=0.06)]
        assert measured.recalls[0] < 1
