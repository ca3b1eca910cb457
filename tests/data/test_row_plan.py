"""The row plan: every document whole, in one row, in order, however it is asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from memorizing_transformers.data.row_plan import IDLE, RowPlan

LENGTHS = np.random.default_rng(7).integers(2, 300, size=37)
SEGMENT = 16


def segments(length: int) -> int:
    return -(-(length - 1) // SEGMENT)


def grid(plan: RowPlan, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents and offsets of the first steps, each (steps, B)."""
    located = [plan.locate(0, step) for step in range(steps)]
    return np.stack([d for d, _ in located]), np.stack([o for _, o in located])


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_training_rows_read_whole_documents_in_order(rows: int) -> None:
    plan = RowPlan(LENGTHS, rows, SEGMENT, seed=3)
    documents, offsets = grid(plan, 400)
    assert (documents != IDLE).all()
    for row in range(rows):
        expected = None
        for document, offset in zip(documents[:, row], offsets[:, row], strict=True):
            if expected is None:
                assert offset == 0
            else:
                assert (document, offset) == expected
            last = offset // SEGMENT + 1 == segments(LENGTHS[document])
            expected = None if last else (document, offset + SEGMENT)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_each_training_pass_reads_every_document_once(rows: int) -> None:
    plan = RowPlan(LENGTHS, rows, SEGMENT, seed=3)
    documents, offsets = grid(plan, 3 * plan.steps_per_epoch)
    # Documents in the order in which they begin; rows that begin together stand side by side.
    begun = documents[offsets == 0]
    count = len(LENGTHS)
    for number in range(2):
        part = begun[number * count : (number + 1) * count]
        if rows == 1:
            assert sorted(part) == list(range(count))
    assert max(Counter(begun.tolist()).values()) - min(Counter(begun.tolist()).values()) <= 1
    assert set(begun[:count]) == set(range(count))


def test_passes_differ_and_the_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        documents, offsets = grid(RowPlan(LENGTHS, 1, SEGMENT, seed=seed), 1000)
        return documents[offsets == 0].tolist()

    count = len(LENGTHS)
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:count] != order(0)[count : 2 * count]


def test_the_order_of_documents_never_changes() -> None:
    """A run resumed years later must find the same plan."""
    documents, offsets = grid(RowPlan([9] * 8, 1, 8, seed=5), 16)
    assert documents[:, 0].tolist() == FROZEN_ORDER
    assert (offsets == 0).all()


FROZEN_ORDER = [7, 4, 3, 5, 6, 2, 0, 1, 7, 6, 1, 5, 4, 2, 0, 3]


def test_answers_do_not_depend_on_what_was_asked_before() -> None:
    positions = [(epoch, step) for epoch in range(4) for step in range(0, 50, 7)]
    straight = RowPlan(LENGTHS, 5, SEGMENT, seed=1)
    expected = {at: straight.locate(*at) for at in positions}
    shuffled = RowPlan(LENGTHS, 5, SEGMENT, seed=1)
    for index in np.random.default_rng(0).permutation(len(positions)):
        documents, offsets = shuffled.locate(*positions[index])
        np.testing.assert_array_equal(documents, expected[positions[index]][0])
        np.testing.assert_array_equal(offsets, expected[positions[index]][1])


def test_training_documents_run_on_over_the_end_of_an_epoch() -> None:
    plan = RowPlan(LENGTHS, 5, SEGMENT)
    steps = plan.steps_per_epoch
    assert steps == -(-sum(map(segments, LENGTHS)) // 5)
    for beyond in range(10):
        for here, there in zip(plan.locate(1, beyond), plan.locate(0, steps + beyond), strict=True):
            np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_evaluation_reads_every_segment_exactly_once(rows: int) -> None:
    plan = RowPlan(LENGTHS, rows, SEGMENT, train=False)
    documents, offsets = grid(plan, plan.steps_per_epoch + 5)
    read = Counter(zip(documents.ravel().tolist(), offsets.ravel().tolist(), strict=True))
    idle = read.pop((IDLE, 0))
    assert read == Counter(
        (document, index * SEGMENT)
        for document, length in enumerate(LENGTHS)
        for index in range(segments(length))
    )
    assert idle == documents.size - read.total()
    assert (documents[plan.steps_per_epoch - 1] != IDLE).any()
    for document in range(len(LENGTHS)):
        steps, rows_of = np.nonzero(documents == document)
        assert len(set(rows_of)) == 1
        assert (np.diff(steps) == 1).all()


def test_evaluation_balances_its_rows() -> None:
    plan = RowPlan(LENGTHS, 4, SEGMENT, train=False)
    total = sum(map(segments, LENGTHS))
    assert plan.steps_per_epoch <= total / 4 * 1.05 + 1


@pytest.mark.parametrize("train", [True, False])
def test_padding_share_counts_places_without_prediction(train: bool) -> None:
    plan = RowPlan(LENGTHS, 4, SEGMENT, train=train)
    predictions = int(sum(LENGTHS)) - len(LENGTHS)
    places = SEGMENT * (sum(map(segments, LENGTHS)) if train else 4 * plan.steps_per_epoch)
    assert plan.padding_share == pytest.approx(1 - predictions / places)
    assert RowPlan([17, 33], 1, SEGMENT, train=train).padding_share == 0


def test_more_rows_than_training_documents_leave_no_row_idle() -> None:
    documents, _ = grid(RowPlan([50, 20], 7, SEGMENT), 40)
    assert set(documents.ravel().tolist()) == {0, 1}


def test_a_million_documents_are_planned_quickly() -> None:
    import time

    lengths = np.random.default_rng(0).integers(2, 5000, size=1_000_000)
    began = time.perf_counter()
    plan = RowPlan(lengths, 256, 512)
    plan.locate(0, plan.steps_per_epoch - 1)
    assert time.perf_counter() - began < 15


@pytest.mark.parametrize(
    "arguments",
    [([], 1, 1), ([5, 1], 1, 1), ([5], 0, 1), ([5], 1, 0), ([5], 1, 1, -1)],
)
def test_impossible_plans_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="at least"):
        RowPlan(*arguments)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        RowPlan([5], 1, 1).locate(0, -1)
