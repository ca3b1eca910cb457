"""Rearranged stores hold the same tokens in other documents, and read them like any store."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.data.row_plan import RowPlan
from memorizing_transformers.data.tokens.shuffled import CutStore, ShuffledStore
from memorizing_transformers.data.tokens.store import TokenStore

LENGTHS = [40, 2, 17, 90, 33, 9, 64, 16, 65, 5]


@pytest.fixture
def store(make_store) -> TokenStore:
    return make_store(LENGTHS)


def everything(store: TokenStore) -> list[int]:
    return [int(token) for index in range(len(store)) for token in store.document(index)]


@pytest.mark.parametrize("tokens", [2, 16, 64, 1000])
def test_cut_documents_are_the_pieces_in_order(store: TokenStore, tokens: int) -> None:
    cut = CutStore(store.folder, store.split, tokens)
    assert cut.lengths.max() <= tokens
    assert cut.lengths.min() >= 2
    expected = [
        whole[start : start + tokens].tolist()
        for whole in map(store.document, range(len(store)))
        for start in range(0, len(whole) - 1, tokens)
    ]
    assert [cut.document(index).tolist() for index in range(len(cut))] == expected
    assert len({*cut.names}) == len(cut) == len(cut.num_bytes)
    left_out = store.lengths.sum() - cut.lengths.sum()
    assert cut.num_bytes.sum() == pytest.approx(store.num_bytes.sum() - 3 * left_out)


@pytest.mark.parametrize("tokens", [1, 8, 16, 1000])
def test_shuffled_documents_hold_all_tokens_once_and_keep_their_lengths(
    store: TokenStore, tokens: int
) -> None:
    shuffled = ShuffledStore(store.folder, store.split, tokens)
    assert shuffled.lengths.tolist() == LENGTHS
    assert shuffled.names == store.names
    assert Counter(everything(shuffled)) == Counter(everything(store))


def test_shuffled_blocks_stay_whole_and_come_from_anywhere(store: TokenStore) -> None:
    shuffled = ShuffledStore(store.folder, store.split, 8)
    foreign = 0
    for index, length in enumerate(LENGTHS):
        tokens = shuffled.document(index)
        for start in range(0, length - 7, 8):
            block = tokens[start : start + 8].astype(int)
            assert np.diff(block).tolist() == [1] * 7
            foreign += block[0] // 1000 != index
        tail = tokens[length // 8 * 8 :]
        assert tail.tolist() == store.document(index)[length // 8 * 8 :].tolist()
    assert foreign > 20
    again = ShuffledStore(store.folder, store.split, 8)
    assert everything(shuffled) == everything(again) != everything(store)


@pytest.mark.parametrize("kind", [CutStore, ShuffledStore])
def test_parts_are_what_the_document_says(store: TokenStore, kind: type) -> None:
    made = kind(store.folder, store.split, 8)
    copy = pickle.loads(pickle.dumps(made))
    for index, length in enumerate(made.lengths):
        for start in range(0, int(length), 5):
            for stop in (start, start + 3, start + 20):
                expected = made.document(index)[start:stop].tolist()
                assert made.read(index, start, stop).tolist() == expected
                assert copy.read(index, start, stop).tolist() == expected


@pytest.mark.parametrize("kind", [CutStore, ShuffledStore])
def test_loader_predicts_every_token_but_the_first(store: TokenStore, kind: type) -> None:
    made = kind(store.folder, store.split, 8)
    loader = SegmentLoader(made, RowPlan(made.lengths, 3, 16, train=False))
    seen = Counter(int(t) for batch in loader for t in batch.targets[batch.mask])
    expected = Counter(
        int(token) for index in range(len(made)) for token in made.document(index)[1:]
    )
    assert seen == expected
