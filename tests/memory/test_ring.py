"""The ring against a list that appends and keeps the last M."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory
from memorizing_transformers.memory.search.reference import reference_search
from memorizing_transformers.memory.storage import quantize, restore


class Pair(NamedTuple):
    key: Tensor
    value: Tensor
    token_id: int
    position: int
    step: int


@dataclass
class SlowRow:
    """One row's memory, as one would explain it."""

    size: int
    pairs: list[Pair] = field(default_factory=list)
    seen: int = 0

    def append(self, key: Tensor, value: Tensor, token_id: int, step: int) -> None:
        self.pairs.append(Pair(key, value, token_id, self.seen, step))
        self.pairs = self.pairs[-self.size :]
        self.seen += 1


class Segment(NamedTuple):
    keys: Tensor
    values: Tensor
    mask: Tensor
    token_ids: Tensor


HEADS, WIDTH = 2, 3


def random_segment(rows: int, length: int, padded: bool = False) -> Segment:
    shape = (rows, HEADS, length, WIDTH)
    real = torch.randint(0, length + 1, (rows,)) if padded else torch.full((rows,), length)
    mask = torch.arange(length) < real[:, None]
    ids = torch.randint(0, 1000, (rows, length))
    return Segment(torch.randn(shape), torch.randn(shape), mask, ids)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a memory of that storage dtype makes of vectors, in fp32."""
    return restore(*quantize(x)) if dtype == torch.int8 else x.to(dtype).float()


def assert_same(memory: Memory, slow: list[SlowRow]) -> None:
    """Everything the ring says of every pair agrees with the lists."""
    age, valid, dtype = memory.age(), memory.valid(), memory.keys.dtype
    keys, values = memory.keys_at(...), restore(memory.values, memory.value_scales)
    for row, expected in enumerate(slow):
        assert memory.fill[row] == len(expected.pairs) == valid[row].sum()
        in_use = valid[row].nonzero().flatten().tolist()
        oldest_first = sorted(in_use, key=lambda slot: int(memory.positions[row, slot]))
        for rank, (slot, pair) in enumerate(zip(oldest_first, expected.pairs, strict=True)):
            assert torch.equal(keys[row, :, slot], as_stored(pair.key, dtype))
            assert torch.equal(values[row, :, slot], as_stored(pair.value, dtype))
            assert memory.token_ids[row, slot] == pair.token_id
            assert memory.positions[row, slot] == pair.position
            assert memory.steps[row, slot] == pair.step
            assert age[row, slot] == len(expected.pairs) - 1 - rank
    assert memory.max_fill >= memory.fill.max()


def write_to_both(
    memory: Memory, segments: list[Segment], slow: list[SlowRow], first_step: int = 0
) -> None:
    for step, segment in enumerate(segments, first_step):
        memory.write(segment.keys, segment.values, segment.mask, segment.token_ids, step)
        for row, token in segment.mask.nonzero().tolist():
            slow[row].append(
                segment.keys[row, :, token],
                segment.values[row, :, token],
                int(segment.token_ids[row, token]),
                step,
            )


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


def test_a_checkpoint_from_before_pairs_could_be_dropped_is_read() -> None:
    source, slow = Memory(2, HEADS, 7, WIDTH), [SlowRow(7), SlowRow(7)]
    write_to_both(source, [random_segment(2, 5) for _ in range(2)], slow)
    old = {name: tensor for name, tensor in source.tensors().items() if name != "oldest"}
    memory = Memory(2, HEADS, 7, WIDTH)
    memory.write(*random_segment(2, 5)[:2])
    memory.drop(torch.tensor([3, 5]))
    memory.load(old)
    assert_same(memory, slow)


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
        if name != "written":  # so the cost of a reset does not grow with M
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
    slots = 2 * 7 * (2 * HEADS * WIDTH * 2 + 12)
    assert slots < memory.nbytes() < slots + 2 * 40


@pytest.mark.parametrize("before", [0, 1, 4], ids=lambda n: f"{n} segments")
@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 3), (7, 20), (7, 50), (12, 8)])
def test_loaded_into_another_size_it_holds_the_newest_pairs_and_no_others(
    old: int, new: int, before: int
) -> None:
    """What the smaller one had overwritten is not there, and is not taken for empty keys either."""
    source, slow = Memory(3, HEADS, old, WIDTH), [SlowRow(old) for _ in range(3)]
    write_to_both(source, [random_segment(3, 5, padded=True) for _ in range(before)], slow)
    memory = Memory(3, HEADS, new, WIDTH)
    memory.write(*random_segment(3, 9)[:2])
    memory.load({name: tensor.clone() for name, tensor in source.tensors().items()})
    for row in slow:
        row.size, row.pairs = new, row.pairs[-new:]
    assert_same(memory, slow)
    for _ in range(15):  # and goes on as if it had been there from the first
        write_to_both(memory, [random_segment(3, 4, padded=True)], slow)
        assert_same(memory, slow)
    for mask in (torch.tensor([True, False, True]), None):
        memory.reset(mask)
        slow = [SlowRow(new), slow[1] if mask is not None else SlowRow(new), SlowRow(new)]
        write_to_both(memory, [random_segment(3, 5)], slow)
        assert_same(memory, slow)


def test_loaded_twice_through_a_larger_one_it_is_still_right() -> None:
    slow, segments = [SlowRow(7)], [random_segment(1, 5) for _ in range(4)]
    memory = Memory(1, HEADS, 7, WIDTH)
    write_to_both(memory, segments, slow)
    for size in (11, 16, 9):
        larger = Memory(1, HEADS, size, WIDTH)
        larger.load(memory.tensors())
        memory = larger
        slow[0].size, slow[0].pairs = size, slow[0].pairs[-size:]
        assert_same(memory, slow)
        write_to_both(memory, [random_segment(1, 2)], slow)
        assert_same(memory, slow)


def test_loaded_into_the_same_size_it_is_the_same_bit_for_bit() -> None:
    source = Memory(3, HEADS, 7, WIDTH)
    source.write(*random_segment(3, 9)[:2])
    source.reset(torch.tensor([True, False, False]))
    source.write(*random_segment(3, 3)[:2])
    memory = Memory(3, HEADS, 7, WIDTH)
    memory.load(source.tensors())
    assert memory.max_fill == source.max_fill
    for name, tensor in source.tensors().items():
        assert torch.equal(memory.tensors()[name], tensor), name
        assert memory.tensors()[name].data_ptr() != tensor.data_ptr(), name


def test_loaded_into_another_dtype_it_is_rounded() -> None:
    source, memory = Memory(1, HEADS, 7, WIDTH), Memory(1, HEADS, 9, WIDTH, torch.bfloat16)
    source.write(*random_segment(1, 6)[:2])
    memory.load(source.tensors())
    assert torch.equal(memory.keys[:, :, :6], source.keys[:, :, :6].bfloat16())
