"""The paired test over documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from memorizing_studies.ablation.paired_test import Difference, compare, sign_flip_test

Read = dict[str, list[float]]


def read(losses: Sequence[float], tokens: Sequence[float] | None = None) -> Read:
    """The sums that an evaluation keeps, for documents with these losses."""
    counts = tokens or [100] * len(losses)
    both = enumerate(zip(counts, losses, strict=True))
    return {f"document {i:04}": [count, float(loss), i] for i, (count, loss) in both}


def compared(variant: Read, base: Read) -> Difference:
    found = compare([variant], [base])
    assert found is not None
    return found


def by_hand(difference: Sequence[float]) -> float:
    """The share of sign patterns whose sum is at least as far from 0, in exact integers."""
    units = [round(1000 * value) for value in difference]
    sums = [abs(sum(flipped)) for flipped in itertools.product(*((d, -d) for d in units))]
    return sum(one >= abs(sum(units)) for one in sums) / len(sums)


@pytest.mark.parametrize("documents", [1, 2, 3, 6, 9, 13])
def test_few_documents_give_the_share_of_all_sign_patterns(documents: int) -> None:
    draw = np.random.default_rng(documents)
    for kind in range(6):
        difference = draw.normal(-1, 2, documents).round(3)
        if kind == 1:
            difference[draw.random(documents) < 0.5] = 0
        if kind >= 2:
            # Equal sums that differ in their last bits in floating point.
            difference = draw.choice([-0.3, -0.1, 0.1, 0.2], documents)
        base = draw.normal(100, 10, documents).round(3)
        exact = by_hand(difference.tolist())
        assert sign_flip_test(base + difference, base) == pytest.approx(exact, abs=1e-12)
        assert sign_flip_test(base - difference, base) == pytest.approx(exact, abs=1e-12)
        several = [sign_flip_test(base + difference, base, seed=seed) for seed in (1, 2)]
        assert several == pytest.approx([exact] * 2, abs=1e-12)


@pytest.mark.parametrize("documents", [*range(1, 18), 100, 1000])
def test_p_is_never_below_what_so_few_documents_can_give(documents: int) -> None:
    base = np.arange(float(documents))
    for seed in range(3):
        p_value = sign_flip_test(base - 0.1, base, seed)
        assert 2 * 0.5**documents <= p_value <= max(2 * 0.5**documents, 0.001)
        # Documents without a difference change nothing.
        padded = np.concatenate([np.zeros(50), base])
        same = sign_flip_test(np.concatenate([np.zeros(50), base - 0.1]), padded, seed)
        assert same == p_value


def test_many_documents_are_drawn_from_by_a_seed_and_agree_with_a_normal_test() -> None:
    draw = np.random.default_rng(3)
    for gain in (0.0, 0.1, 0.15):
        difference = draw.normal(-gain, 1, 400)
        found = [sign_flip_test(difference, np.zeros(400), seed) for seed in (5, 5, 6)]
        assert found[0] == found[1]
        score = abs(difference.sum()) / math.sqrt((difference**2).sum())
        assert found == pytest.approx([math.erfc(score / math.sqrt(2))] * 3, abs=0.02)
        other = sign_flip_test(-difference, np.zeros(400), 5)
        assert other == pytest.approx(found[0], abs=0.02)


def test_false_alarms_are_as_frequent_as_the_level() -> None:
    draw = np.random.default_rng(2)
    base = np.zeros(20)
    below = [sign_flip_test(draw.normal(size=20), base) < 0.1 for _ in range(200)]
    assert 0.04 < np.mean(below) < 0.17


def test_no_difference_gives_p_of_1() -> None:
    for documents in (1, 9, 30):
        base = np.arange(float(documents))
        assert sign_flip_test(base, base) == 1
    assert sign_flip_test([3.0], [4.0]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_document_weighs_as_much_as_its_summed_loss(seed: int) -> None:
    """One long document against many short ones with the opposite sign."""
    draw = np.random.default_rng(seed)
    tokens = [20_000, *draw.integers(20, 60, 9).tolist()]
    per_token = [0.004, *(-0.05 - 0.01 * draw.random(9))]
    difference = [round(n * one, 3) for n, one in zip(tokens, per_token, strict=True)]
    base = draw.normal(100, 10, 10).round(3)
    found = compared(read(base + difference, tokens), read(base, tokens))
    exact = by_hand(difference)
    assert found.p_value == pytest.approx(exact, abs=1e-12)
    # The means per token would give the opposite result, and a significant one.
    assert found.loss > 0
    assert exact > 10 * by_hand(per_token)
    for others in (tokens[::-1], [100] * 10):
        again = compared(read(base + difference, others), read(base, others))
        assert again.p_value == found.p_value
        assert again.loss == pytest.approx(sum(difference) / sum(others))


def test_seeds_are_averaged_and_long_documents_weigh_more() -> None:
    base = [{"a": [10, 20.0, 1], "b": [30, 30.0, 2]}, {"a": [10, 22.0, 1], "b": [30, 30.0, 2]}]
    other = [{"a": [10, 16.0, 1], "b": [30, 24.0, 2]}, {"a": [10, 18.0, 1], "b": [30, 24.0, 2]}]
    found = compare(other, base)
    assert found is not None
    assert found.loss == pytest.approx(-10 / 40)
    assert found.documents == 2
    assert found.spread == pytest.approx(0)


def test_p_is_from_the_means_of_documents_over_seeds() -> None:
    draw = np.random.default_rng(4)
    base = [draw.normal(100, 1, 8).round(3) for _ in range(3)]
    variant = [one + draw.normal(-1, 3, 8).round(3) for one in base]
    found = compare([read(one) for one in variant], [read(one) for one in base])
    assert found is not None
    # Three times the mean, so that all are multiples of 0.001.
    exact = by_hand((sum(variant) - sum(base)).tolist())
    assert found.p_value == pytest.approx(exact, abs=1e-12)


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
