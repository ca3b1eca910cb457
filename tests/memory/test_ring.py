"""The ring against a list that appends and keeps the last M."""

from __future__ import annotations

import pytest
import torch
from slow_ring import HEADS, WIDTH, SlowRow, assert_same, random_segment, write_to_both

from memorizing_transformers.memory import Memory
from memorizing_transformers.memory.search.reference import reference_search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("size", "length"), [(12, 4), (10, 4), (7, 3), (13, 63), (1, 1), (5, 5)])
def test_keeps_the_last_pairs_of_every_row(
    size: int, length: int, padded: bool, dtype: torch.dtype
) -> None:
    memory = Memory(3, HEADS, size, WIDTH, dtype)
    slow = [SlowRow(size) for _ in range(3)]
    for step in range(12):
        forget = torch.rand(3) < 0.15
        memory.reset(forget)
        slow = [SlowRow(size) if forget[row] else slow[row] for row in range(3)]
        segment = random_segment(3, length, padded)
        write_to_both(memory, [segment], slow, step)
        assert_same(memory, slow)


def test_no_mask_means_all_tokens() -> None:
    segment = random_segment(2, 5)
    with_mask, without = (Memory(2, HEADS, 7, WIDTH) for _ in range(2))
    for _ in range(3):
        with_mask.write(segment.keys, segment.values, segment.mask, segment.token_ids)
        without.write(segment.keys, segment.values, None, segment.token_ids)
    for name, tensor in with_mask.tensors().items():
        assert torch.equal(tensor, without.tensors()[name]), name


@pytest.mark.parametrize("size", [7, 12, 31])
def test_dropped_pairs_are_gone_for_good(size: int) -> None:
    """Through wrapping, resets, and loading into a memory of any size."""
    memory, slow = Memory(3, HEADS, size, WIDTH), [SlowRow(size) for _ in range(3)]
    for step in range(60):
        write_to_both(memory, [random_segment(3, 5, padded=True)], slow, step)
        count = torch.randint(0, 9, (3,)) * (torch.rand(3) < 0.3)
        memory.drop(count)
        for row, gone in zip(slow, count.tolist(), strict=True):
            row.pairs = row.pairs[gone:]
        assert_same(memory, slow)
        for row, (count_, held) in enumerate(memory.retrievable()):
            index = torch.arange(memory.size)[held]
            assert len(index) == count_ == memory.fill[row]
            assert memory.valid()[row, index].all()
        if step % 7 == 6:
            larger = Memory(3, HEADS, memory.size + int(torch.randint(-3, 4, ())), WIDTH)
            larger.load({name: tensor.clone() for name, tensor in memory.tensors().items()})
            memory = larger
            for row in slow:
                row.size, row.pairs = larger.size, row.pairs[-larger.size :]
            assert_same(memory, slow)
        if step % 11 == 10:
            memory.reset(torch.tensor([True, False, step % 2 == 0]))
            slow[0] = SlowRow(memory.size)
            slow[2] = SlowRow(memory.size) if step % 2 == 0 else slow[2]


def test_what_is_too_old_is_dropped_and_no_more() -> None:
    memory, slow = Memory(2, HEADS, 12, WIDTH), [SlowRow(12), SlowRow(12)]
    for step in range(9):
        write_to_both(memory, [random_segment(2, 4, padded=True)], slow, step)
        memory.drop_written_before(step - 1)
        for row in slow:
            row.pairs = [pair for pair in row.pairs if pair.step >= step - 1]
        assert_same(memory, slow)


@pytest.mark.parametrize("size", [7, 12])
def test_a_document_may_be_longer_than_32_bits_count(size: int) -> None:
    """Positions, ages and what is retrieved, at once and after loading into another size."""
    memory, slow = Memory(2, HEADS, size, WIDTH), [SlowRow(size) for _ in range(2)]
    far = torch.tensor([2**31 - 3, 2**33])
    for count in (memory.written, memory.origin, memory.oldest):
        count.copy_(far)
    for row, first in zip(slow, far.tolist(), strict=True):
        row.seen = first
    for _ in range(4):
        write_to_both(memory, [random_segment(2, 5, padded=True)], slow)
        assert_same(memory, slow)
    assert memory.positions[memory.valid()].min() > 2**31 - 4
    larger = Memory(2, HEADS, size + 3, WIDTH)
    larger.load(memory.tensors())
    for row in slow:
        row.size += 3
    assert_same(larger, slow)


def test_rewound_a_row_is_written_over_from_there() -> None:
    memory, slow = Memory(3, HEADS, 12, WIDTH), [SlowRow(12) for _ in range(3)]
    write_to_both(memory, [random_segment(3, 5) for _ in range(4)], slow)
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    bound = memory.max_fill
    again = random_segment(3, 5)
    with memory.rewound(torch.tensor([15, 20, 9])):
        # Pairs 8 to 19 are there; what is to be written over cannot be retrieved.
        assert memory.fill.tolist() == [7, 12, 1]
        memory.write(*again[:2], torch.tensor([[True], [False], [True]]).expand(3, 5), step=9)
    assert memory.written.tolist() == [20, 20, 20]
    assert memory.fill.tolist() == [12, 12, 12]
    assert memory.max_fill == bound
    for row, first in ((0, 15), (1, 20), (2, 9)):
        place = (memory.positions[row] >= first) & (memory.positions[row] < first + 5)
        assert torch.equal(memory.keys[row][:, ~place], before["keys"][row][:, ~place])
        order = memory.positions[row, place].argsort()
        if first < 20:
            assert torch.equal(memory.keys[row][:, place][:, order], again.keys[row])
            assert (memory.steps[row, place] == 9).all()
    assert (memory.document - 1 == torch.tensor([0, -1, 0])).all()


def test_wrapping_around_many_times_keeps_count() -> None:
    memory = Memory(1, HEADS, 7, WIDTH)
    for _ in range(50):
        memory.write(*random_segment(1, 9)[:2])
    assert sorted(memory.positions[0].tolist()) == list(range(50 * 9 - 7, 50 * 9))


def test_a_written_pair_is_the_top_neighbour_of_its_own_key() -> None:
    memory = Memory(2, HEADS, 31, WIDTH)
    for _ in range(4):
        segment = random_segment(2, 10)
        memory.write(torch.nn.functional.normalize(segment.keys, dim=-1), segment.values)
    slots, valid = reference_search(memory.keys, memory, 1)
    assert valid.all()
    assert torch.equal(slots[..., 0], torch.arange(31).expand(2, HEADS, 31))


def test_reset_touches_the_flagged_rows_count_and_nothing_else() -> None:
    memory = Memory(3, HEADS, 7, WIDTH)
    memory.write(*random_segment(3, 5))
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    memory.reset(torch.tensor([False, True, False]))
    assert memory.written.tolist() == [5, 0, 5]
    for name, tensor in memory.tensors().items():
        if name not in ("written", "bound"):  # so the cost of a reset does not grow with M
            assert torch.equal(tensor, before[name]), name


def test_reset_without_a_mask_empties_every_row() -> None:
    memory = Memory(3, HEADS, 7, WIDTH)
    memory.write(*random_segment(3, 5))
    memory.reset()
    assert not memory.valid().any()
    assert memory.max_fill == 0


def test_what_is_stored_has_no_history_and_no_alias() -> None:
    segment = random_segment(1, 4)
    keys, values = segment.keys.requires_grad_(), segment.values.requires_grad_()
    memory = Memory(1, HEADS, 7, WIDTH)
    memory.write(keys, values)
    stored = memory.keys.clone()
    with torch.no_grad():
        keys.zero_()
    assert not memory.keys.requires_grad
    assert not memory.values.requires_grad
    assert torch.equal(memory.keys, stored)


def test_bytes_are_counted() -> None:
    memory = Memory(2, HEADS, 7, WIDTH, torch.bfloat16)
    slots = 2 * 7 * (2 * HEADS * WIDTH * 2 + 8)
    assert slots < memory.nbytes() < slots + 2 * 40


def test_positions_of_slots_without_a_pair_can_index_a_document() -> None:
    """Whoever looks positions up in a document's tokens need not mask them first."""
    memory = Memory(3, 1, 16, 4)
    memory.write(*torch.randn(2, 3, 1, 5, 4), torch.arange(5) < torch.tensor([[5], [2], [0]]))
    assert memory.positions.min() == 0
    assert memory.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    memory.reset(torch.tensor([True, False, False]))
    assert not memory.positions[0].any()
