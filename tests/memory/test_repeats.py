"""Repeats of a text in its memory are those that reading it backwards finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, MemoryView, Repeats, RepeatSearch
from memorizing_transformers.memory.repeats import ORDERS

Found = list[tuple[int, int, int]]


def slow_repeats(text: list[int], first: int, per_order: int, longest: int) -> Found:
    """(token that followed, length, distance) for the last token of ``text``, sorted."""
    here, found = len(text) - 1, []
    lengths = {}
    for then in range(first, here):
        length = 0
        while length < longest and then - length >= first:
            if text[then - length] != text[here - length]:
                break
            length += 1
        lengths[then] = length
    for order, above in zip(ORDERS, (longest + 1, *ORDERS), strict=False):
        newest = [then for then in sorted(lengths, reverse=True) if lengths[then] >= order]
        found += [
            (text[then + 1], lengths[then], here - then)
            for then in newest[:per_order]
            if lengths[then] < above
        ]
    return sorted(found)


def listed(repeats: Repeats, row: int, token: int) -> Found:
    columns = [x[row, token].tolist() for x in repeats]
    return sorted(one for one in zip(*columns, strict=True) if one[1])


def write(memory: Memory, ids: Tensor, mask: Tensor | None = None) -> None:
    pairs = torch.zeros(ids.shape[0], 1, ids.shape[1], 2)
    memory.write(pairs, pairs, mask, ids)


@pytest.mark.parametrize(
    ("size", "segment", "vocab", "seed"),
    [(40, 7, 3, 0), (64, 16, 6, 1), (16, 20, 4, 2), (100, 1, 3, 3), (12, 5, 2, 4), (5, 4, 2, 5)],
)
def test_they_are_those_of_a_slow_search(size: int, segment: int, vocab: int, seed: int) -> None:
    """Over resets, padding, dropped pairs and a ring that is written over many times."""
    generator = torch.Generator().manual_seed(seed)
    memory, texts, per_order, longest = Memory(3, 1, size, 2), [[], [], []], 64, 12
    search = RepeatSearch(per_order, longest)
    compared = 0
    for turn in range(30):
        if turn in (11, 23):
            mask = torch.tensor([True, False, turn == 23])
            memory.reset(mask)
            texts = [[] if mask[row] else text for row, text in enumerate(texts)]
        if turn == 17:
            memory.drop(torch.tensor([0, 3, 9]))
        ids = torch.randint(0, vocab, (3, segment), generator=generator)
        before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
        repeats = search(ids, memory)
        assert all(torch.equal(before[name], new) for name, new in memory.tensors().items())
        for row, text in enumerate(texts):
            first = len(text) - int(memory.fill[row])
            for token in range(segment):
                known = text + ids[row, : token + 1].tolist()
                expected = slow_repeats(known, first, per_order, longest)
                assert listed(repeats, row, token) == expected
                compared += len(expected)
        mask = torch.arange(segment) < torch.randint(1, segment + 1, (3, 1), generator=generator)
        write(memory, ids, mask)
        for row, text in enumerate(texts):
            text += ids[row, mask[row]].tolist()
    assert compared > 50


def test_the_newest_are_kept() -> None:
    memory = Memory(1, 1, 64, 2)
    write(memory, torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 6]]))
    repeats = RepeatSearch(per_order=2)(torch.tensor([[1, 2]]), memory)
    assert listed(repeats, 0, 1) == [(5, 2, 6), (6, 2, 3)]


def test_a_fresh_search_finds_the_same() -> None:
    """So that a resumed run reads what the unbroken one does."""
    generator = torch.Generator().manual_seed(0)
    memory, search = Memory(2, 1, 50, 2), RepeatSearch(per_order=3)
    for _ in range(20):
        ids = torch.randint(0, 4, (2, 8), generator=generator)
        repeats, fresh = search(ids, memory), RepeatSearch(per_order=3)(ids, memory)
        for row in range(2):
            for token in range(8):
                assert listed(repeats, row, token) == listed(fresh, row, token)
        write(memory, ids)


def test_a_memory_that_was_loaded_is_read_again() -> None:
    memory, search = Memory(1, 1, 32, 2), RepeatSearch()
    write(memory, torch.tensor([[1, 2, 3, 4, 1, 2]]))
    saved = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    memory.reset()
    write(memory, torch.tensor([[1, 2, 5, 4, 1, 2]]))
    ids = torch.tensor([[1, 2]])
    assert {token for token, *_ in listed(search(ids, memory), 0, 1)} == {1, 5}
    memory.load(saved)
    assert {token for token, *_ in listed(search(ids, memory), 0, 1)} == {1, 3}


def test_a_memory_that_is_written_over_is_read_again() -> None:
    """While it is rewound and afterwards."""
    generator = torch.Generator().manual_seed(0)
    memory, search = Memory(1, 1, 32, 2), RepeatSearch(per_order=16)
    write(memory, torch.randint(0, 3, (1, 30), generator=generator))
    ids = torch.randint(0, 3, (1, 4), generator=generator)

    def assert_right() -> None:
        fresh = RepeatSearch(per_order=16)(ids, memory)
        assert [x.shape for x in fresh] == [x.shape for x in search(ids, memory)]
        for token in range(4):
            assert listed(search(ids, memory), 0, token) == listed(fresh, 0, token)

    assert_right()
    with memory.rewound(torch.tensor([20])):
        write(memory, torch.randint(0, 3, (1, 2), generator=generator))
        assert_right()
    assert_right()


def test_rows_of_a_view_read_their_owners() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, search = Memory(2, 1, 32, 2), RepeatSearch()
    write(memory, torch.randint(0, 3, (2, 20), generator=generator))
    ids = torch.randint(0, 3, (3, 6), generator=generator)
    owners = [1, 0, 1]
    viewed = search(ids, MemoryView(memory, owners))
    for row, owner in enumerate(owners):
        both = ids[[row, row]]
        direct = search(both, memory)
        for token in range(6):
            assert listed(viewed, row, token) == listed(direct, owner, token)


def test_a_token_knows_nothing_of_those_after_it() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, search = Memory(1, 1, 64, 2), RepeatSearch()
    write(memory, torch.randint(0, 3, (1, 40), generator=generator))
    ids = torch.randint(0, 3, (1, 12), generator=generator)
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 3
    first, second = search(ids, memory), search(other, memory)
    for token in range(6):
        assert listed(first, 0, token) == listed(second, 0, token)
