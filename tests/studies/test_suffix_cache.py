"""The suffix cache sums to one, knows no future, and finds what repeats."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_studies.rivals.suffix_cache import (
    SuffixCache,
    documents,
    mixed_losses,
    suffix_cache,
)
from memorizing_transformers.errors import ConfigError

VOCAB = 5


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def test_the_mixture_sums_to_one() -> None:
    cache, own = SuffixCache(100), [0.1, 0.2, 0.3, 0.25, 0.15]
    for token in text(200):
        total = sum(deepcopy(cache).read(other, own[other]) for other in range(VOCAB))
        assert total == pytest.approx(1.0)
        cache.read(token, own[token])
    assert cache.forecast()[0] > 0


def test_it_knows_no_future() -> None:
    tokens, losses = text(300), [1.5] * 300
    other = tokens[:200] + text(100, seed=1)
    first, second = (mixed_losses(one, losses, 300) for one in (tokens, other))
    assert first[:200] == second[:200]
    assert first[200:] != second[200:]


def test_what_repeats_becomes_cheap_and_the_rest_hardly_dearer() -> None:
    half = random.Random(0).choices(range(1000), k=400)
    losses = mixed_losses(half * 2, [5.0] * 800, 10_000)
    assert losses[:400] == pytest.approx([5.0] * 400)
    assert sum(losses[410:]) < 0.2 * 5.0 * 390


def test_the_window_bounds_how_far_it_sees() -> None:
    half = random.Random(0).choices(range(1000), k=400)
    near = mixed_losses(half * 2, [5.0] * 800, 399)
    assert near == pytest.approx([5.0] * 800)


def test_a_match_is_as_long_as_the_texts_agree() -> None:
    cache = SuffixCache(100)
    for token in [7, 1, 2, 3, 4, 9, 8, 1, 2, 3, 4]:
        cache.read(token, 0.1)
    assert cache.forecast() == (4, {9: 1.0})


def write(path: Path) -> None:
    rows = {
        "document": ["a", "b", "a"],
        "position": [0, 0, 2],
        "token": [[1, 2], [5], [3, 1]],
        "loss": [[1.0, 1.0], [2.0], [1.0, 1.0]],
    }
    pq.write_table(pa.table(rows), path)


def test_predictions_are_read_document_by_document(tmp_path: Path) -> None:
    write(tmp_path / "predictions.parquet")
    found = documents(tmp_path / "predictions.parquet")
    assert found == {"a": ([1, 2, 3, 1], [1.0] * 4), "b": ([5], [2.0])}


def test_the_table_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "predictions.parquet")
    suffix_cache(str(tmp_path / "predictions.parquet"))
    out = capsys.readouterr().out
    assert f"{math.exp(6 / 5):.3f}" in out
    assert "with suffix cache" in out


@pytest.mark.parametrize("given", [{"predictions": "nowhere.parquet"}, {"window": 0}])
def test_mistakes_name_the_key(given: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=next(iter(given))):
        suffix_cache(**{"predictions": str(tmp_path / "p.parquet"), **given})  # type: ignore[arg-type]
