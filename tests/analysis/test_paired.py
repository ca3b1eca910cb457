"""The paired test over documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from memorizing_transformers.analysis.paired import compare, sign_flip_test


def test_agrees_with_all_sign_flips_by_hand() -> None:
    draw = np.random.default_rng(1)
    tokens, base = draw.integers(50, 500, 10), draw.normal(100, 10, 10)
    losses = base + draw.normal(-2, 4, 10)
    difference = losses - base
    flips = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = (np.abs(flips @ difference) >= abs(difference.sum()) - 1e-9).mean()
    assert sign_flip_test(tokens, losses, base) == pytest.approx(exact, abs=0.02)


def test_false_alarms_are_as_rare_as_the_level() -> None:
    draw = np.random.default_rng(2)
    tokens, base = np.full(20, 100), np.zeros(20)
    below = [sign_flip_test(tokens, draw.normal(size=20), base) < 0.1 for _ in range(200)]
    assert 0.04 < np.mean(below) < 0.17


def test_a_gain_on_every_document_is_found_and_no_difference_is_none() -> None:
    tokens, base = np.full(30, 100), np.arange(30.0)
    assert sign_flip_test(tokens, base - 0.1, base) == pytest.approx(1e-4)
    assert sign_flip_test(tokens, base, base) == 1


def test_seeds_are_averaged_and_long_documents_weigh_more() -> None:
    base = [{"a": [10, 20.0, 1], "b": [30, 30.0, 2]}, {"a": [10, 22.0, 1], "b": [30, 30.0, 2]}]
    other = [{"a": [10, 16.0, 1], "b": [30, 24.0, 2]}, {"a": [10, 18.0, 1], "b": [30, 24.0, 2]}]
    found = compare(other, base)
    assert found is not None
    assert found.loss == pytest.approx(-10 / 40)
    assert found.documents == 2
    assert found.spread == pytest.approx(0)


def test_the_spread_is_over_the_differences_of_the_seeds() -> None:
    base = [{"a": [10, 20.0, 1]}, {"a": [10, 90.0, 1]}, {"a": [10, 50.0, 1]}]
    other = [{"a": [10, 17.0, 1]}, {"a": [10, 88.0, 1]}, {"a": [10, 49.0, 1]}]
    found = compare(other, base)
    assert found is not None
    assert found.loss == pytest.approx(-0.2)
    assert found.spread == pytest.approx(0.1)
    alone = compare(other[:1], base[:1])
    assert alone is not None
    assert alone.spread is None


@pytest.mark.parametrize("other", [{"a": [10, 1.0, 2]}, {"a": [9, 1.0, 1]}, {"b": [10, 1.0, 1]}])
def test_other_tokens_are_not_compared(other: dict[str, list[float]]) -> None:
    assert compare([other], [{"a": [10, 1.0, 1]}]) is None
