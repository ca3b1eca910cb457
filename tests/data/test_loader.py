"""The loader: batches of this rank's rows, and a position that survives a stop."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from memorizing_transformers.data.batch import IGNORE_INDEX, Batch
from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.data.row_plan import RowPlan

LENGTHS = [40, 2, 17, 90, 33, 9, 64, 16, 65, 5]
SEGMENT = 16


@pytest.fixture
def store(make_store):
    return make_store(LENGTHS)


def loader(store, rows: int = 4, train: bool = True, **options) -> SegmentLoader:
    return SegmentLoader(store, RowPlan(store.lengths, rows, SEGMENT, 1, train), **options)


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_shapes_and_types(store) -> None:
    batch = next(iter(loader(store)))
    assert batch.input_ids.shape == batch.targets.shape == (4, SEGMENT)
    for tensor in batch[2:]:
        assert tensor.shape == (4,)
    assert [tensor.dtype for tensor in batch] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
        torch.int64,
        torch.int64,
    ]
    assert batch.num_bytes.shape == (4,)
    assert batch.num_bytes.dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_evaluation_predicts_every_token_but_the_first_once(store, rows: int) -> None:
    batches = list(loader(store, rows, train=False))
    pairs = []
    for batch in batches:
        pairs += zip(batch.input_ids[batch.mask], batch.targets[batch.mask], strict=True)
    expected = [
        (1000 * document + p, 1000 * document + p + 1)
        for document, length in enumerate(LENGTHS)
        for p in range(length - 1)
    ]
    assert sorted((int(a), int(b)) for a, b in pairs) == expected


def test_targets_run_on_over_the_border_of_segments(store) -> None:
    before: dict[int, Batch] = {}
    for batch in islice(loader(store), 60):
        for row in range(4):
            last = before.get(row)
            if not batch.reset[row]:
                assert last is not None
                assert batch.document[row] == last.document[row]
                assert batch.position[row] == last.position[row] + SEGMENT
                assert batch.input_ids[row, 0] == last.targets[row, -1]
            before[row] = batch


def test_padding_stands_only_behind_a_document_and_counts_nowhere(store) -> None:
    for batch in loader(store, 8, train=False):
        for row in range(8):
            document, position = int(batch.document[row]), int(batch.position[row])
            counted = 0 if document < 0 else min(SEGMENT, LENGTHS[document] - 1 - position)
            assert batch.mask[row].tolist() == [p < counted for p in range(SEGMENT)]
            assert (batch.targets[row, counted:] == IGNORE_INDEX).all()
            assert (batch.input_ids[row, counted:] == 0).all()


def test_reset_marks_new_documents_and_idle_rows(store) -> None:
    batches = list(loader(store, 8, train=False))
    reset = torch.stack([batch.reset for batch in batches])
    document = torch.stack([batch.document for batch in batches])
    position = torch.stack([batch.position for batch in batches])
    assert torch.equal(reset, position == 0)
    assert (document == -1).any()
    assert reset[document == -1].all()
    assert int((reset & (document >= 0)).sum()) == len(LENGTHS)


def test_bytes_are_shared_out_by_counted_targets(store) -> None:
    total = sum(float(batch.num_bytes.sum()) for batch in loader(store, 3, train=False))
    assert total == pytest.approx(sum(3 * (length - 1) for length in LENGTHS))


@pytest.mark.parametrize("train", [True, False])
def test_ranks_slices_make_up_the_global_batch(store, train: bool) -> None:
    whole = list(loader(store, 6, train))
    parts = [list(loader(store, 6, train, rank=rank, world_size=3)) for rank in range(3)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert same(batch, Batch(*(torch.cat(field) for field in zip(*pieces, strict=True))))


def test_rows_that_cannot_be_shared_are_refused(store) -> None:
    with pytest.raises(ValueError, match="4 rows, rank 0 of 3"):
        loader(store, 4, world_size=3)


@pytest.mark.parametrize("delivered", [0, 1, 5, 6, 7, 17])
def test_a_loaded_position_goes_on_with_the_next_batch(store, delivered: int) -> None:
    first = loader(store)
    assert len(first) == 6
    stream = [batch for _ in range(4) for batch in first]
    assert len(stream) == 4 * len(first)

    stopped = loader(store)
    for _ in islice((batch for _ in range(3) for batch in stopped), delivered):
        pass
    state = stopped.state_dict()
    assert state == {"epoch": delivered // len(first), "step": delivered % len(first)}

    resumed = loader(store)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == len(first) - delivered % len(first)
    following = list(resumed)
    assert len(following) == len(first)
    for got, expected in zip(rest + following, stream[delivered:], strict=False):
        assert same(got, expected)


def test_an_iterator_that_is_dropped_moves_nothing(store) -> None:
    dropped = loader(store)
    dropped.load_state_dict({"epoch": 1, "step": 5})
    iter(dropped)
    iter(dropped)
    assert dropped.state_dict() == {"epoch": 1, "step": 5}
    assert same(next(iter(dropped)), loader(store).batch(1, 5))


def test_a_training_iteration_left_early_goes_on(store) -> None:
    """Else rows would jump into the middle of documents that their memory has not read."""
    limited = loader(store, steps=4)
    stream = [batch for _ in range(5) for batch in limited]
    whole = loader(store)
    expected = [batch for _ in range(4) for batch in whole][:20]
    assert len(stream) == 20
    assert all(same(a, b) for a, b in zip(stream, expected, strict=True))

    resumed = loader(store, steps=4)
    resumed.load_state_dict({"epoch": 1, "step": 3})  # batch 9 of the stream
    rest = list(resumed)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(rest, expected[9:12], strict=True))


def test_repeat_starts_every_iteration_anew(store) -> None:
    repeated = loader(store, steps=3, repeat=True)
    first, second = list(repeated), list(repeated)
    assert len(first) == 3
    assert first[0].reset.all()
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_starts_anew_after_an_iteration_left_early(store) -> None:
    evaluation = loader(store, train=False)
    first = [batch for batch, _ in zip(evaluation, range(2), strict=False)]
    again = list(evaluation)
    assert len(again) == len(evaluation)
    assert same(first[0], again[0])
    assert np.isclose(sum(float(b.mask.sum()) for b in again), sum(LENGTHS) - len(LENGTHS))


def test_a_loaded_position_holds_for_one_evaluation(store) -> None:
    evaluation = loader(store, train=False)
    evaluation.load_state_dict({"epoch": 0, "step": 3})
    assert len(list(evaluation)) == len(evaluation) - 3
    next(iter(evaluation))
    assert len(list(evaluation)) == len(evaluation)


@pytest.mark.parametrize("read", [0, 2, 5])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_loader_that_follows_another_resumes_where_that_one_would(
    store, read: int, loaded: bool
) -> None:
    first, second = loader(store, steps=5), loader(store, steps=5)
    for kept in (first, second):
        list(islice(kept, read))
        if loaded:
            kept.load_state_dict(kept.state_dict())
    follower = loader(store, steps=5)
    follower.follow(first)
    for _ in range(2):
        ours, theirs = list(follower), list(second)
        assert len(ours) == len(theirs)
        assert all(same(*pair) for pair in zip(ours, theirs, strict=True))
