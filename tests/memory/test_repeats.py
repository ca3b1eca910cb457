"""Repeats of a text in its memory are those that reading it backwards finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, MemoryView, Repeats, RepeatSearch
from memorizing_transformers.memory.repeats import LEAD, ORDERS, TABLE_BITS, _hashes

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


@pytest.mark.parametrize("order", ORDERS)
def test_suffixes_of_the_same_tokens_in_another_order_differ(order: int) -> None:
    """But for collisions by chance."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 5000, (2000, LEAD + 1), generator=generator)
    place = ORDERS.index(order)
    for one, other in itertools.combinations(range(LEAD + 1 - order, LEAD + 1), 2):
        swapped = texts.clone()
        swapped[:, [one, other]] = texts[:, [other, one]]
        same = [_hashes(x)[place][:, -1] for x in (texts, swapped)]
        equal = (same[0] == same[1]) & (texts[:, one] != texts[:, other])
        assert equal.sum() <= 3, (one, other)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", [2, 3, 700])
def test_a_hash_tells_its_suffix_as_a_random_one_would(order: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 20000
    ends = torch.randint(0, vocab, (count, order), generator=generator).unique(dim=0)
    leads = torch.randint(0, vocab, (2, len(ends), LEAD + 1 - order), generator=generator)
    one, other = (_hashes(torch.cat([lead, ends], 1))[ORDERS.index(order)][:, -1] for lead in leads)
    assert torch.equal(one, other)  # of the suffix alone
    slots = 2**TABLE_BITS
    expected = slots * (1 - (1 - 1 / slots) ** len(ends))
    assert len(one.unique()) >= 0.98 * expected


@pytest.mark.parametrize("pattern", ["abcd", "abcdefgh"])
def test_orders_of_the_same_tokens_hide_no_candidate(pattern: str) -> None:
    """Though few are kept: each is one of the newest true repeats, and none of them is missing."""
    generator = torch.Generator().manual_seed(0)
    memory, text, per_order, longest = Memory(1, 1, 200, 2), [], 2, 12
    search = RepeatSearch(per_order, longest)
    length, compared = len(pattern), 0
    for _ in range(40):
        orders = [torch.randperm(length, generator=generator).tolist() for _ in range(2)]
        ids = torch.tensor([[ord(pattern[i]) for order in orders for i in order]])
        repeats = search(ids, memory)
        for token in range(ids.shape[1]):
            known = text + ids[0, : token + 1].tolist()
            expected = slow_repeats(known, len(text) - int(memory.fill[0]), per_order, longest)
            assert listed(repeats, 0, token) == expected
            compared += len(expected)
        write(memory, ids)
        text += ids[0].tolist()
    assert compared > 100


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
