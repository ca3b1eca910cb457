"""What the host knows of a memory elsewhere: how full each row is, without asking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_ring import HEADS, WIDTH, SlowRow, assert_same, random_segment, write_to_both
from torch import Tensor
from two_devices import AWAY, two_devices
from waits import Waits

from memorizing_transformers.memory import Memory, RepeatSearch
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.memory.search.kernels.score_blocks import runs, score_blocks
from memorizing_transformers.memory.search.kernels.torch_buckets import torch_buckets
from memorizing_transformers.memory.search.reference import reference_search
from memorizing_transformers.memory.view import MemoryView

ROWS = 4


def lives(size: int, dtype: torch.dtype, steps: int = 25) -> tuple[Memory, Memory, list[SlowRow]]:
    """A memory on each device after the same writes and resets, and the lists."""
    here, away = (
        Memory(ROWS, HEADS, size, WIDTH, dtype),
        Memory(ROWS, HEADS, size, WIDTH, dtype, AWAY),
    )
    slow = [SlowRow(size) for _ in range(ROWS)]
    for step in range(steps):
        forget = torch.rand(ROWS) < 0.2
        here.reset(forget)
        moved = forget.to(AWAY)
        segment = random_segment(ROWS, 5, padded=True)
        keys, values, mask, ids = (x.to(AWAY) for x in segment)
        with Waits() as waits:
            away.reset(moved, forget)
            away.write(keys, values, mask, ids, step)
        assert waits.seen == []
        slow = [SlowRow(size) if forget[row] else slow[row] for row in range(ROWS)]
        write_to_both(here, [segment], slow, step)
    return here, away, slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7, 40])
def test_a_memory_elsewhere_is_written_and_reset_without_a_wait(
    size: int, dtype: torch.dtype
) -> None:
    with two_devices("cuda"):
        here, away, slow = lives(size, dtype)
        found = {name: tensor.to("cpu") for name, tensor in away.tensors().items()}
    assert_same(here, slow)
    for name, tensor in here.tensors().items():
        assert torch.equal(found[name], tensor), name


def test_the_bound_of_a_row_is_what_it_holds() -> None:
    """Exact where no segment was padded, whatever else was reset; and no less where one was."""
    memory = Memory(3, HEADS, 12, WIDTH)
    for _ in range(2):
        memory.write(*random_segment(3, 5)[:2])
    assert memory.bounds == [10, 10, 10]
    memory.reset(torch.tensor([True, False, True]))
    assert (memory.bounds, memory.max_fill) == ([0, 10, 0], 10)
    memory.write(*random_segment(3, 5)[:3])
    assert memory.bounds == [5, 12, 5] == memory.used.tolist()
    view = MemoryView(memory, [2, 2, 0])
    assert (view.bounds, view.max_fill) == ([5, 5, 5], 5)
    assert memory.take(torch.tensor([1])).bounds == [12]
    memory.reset(torch.tensor([False, True, False]))
    assert memory.max_fill == 5
    memory.write(*random_segment(3, 5, padded=True)[:3])
    assert all(b >= u for b, u in zip(memory.bounds, memory.used.tolist(), strict=True))


def test_without_a_mask_on_the_host_the_bound_stays() -> None:
    """To ask would wait; what is scored is then more than needed, and right."""
    with two_devices("cuda"):
        memory = Memory(2, HEADS, 12, WIDTH, device=AWAY)
        memory.write(*(x.to(AWAY) for x in random_segment(2, 5)))
        mask = torch.tensor([True, False])
        memory.reset(mask.to(AWAY))
        assert memory.bounds == [5, 5]
        memory.reset(mask.to(AWAY), mask)
        assert memory.bounds == [0, 5]


def scored(queries: Tensor, memory: Any, room: int) -> int:
    """Slots that are scored, over all rows."""
    blocks = score_blocks(queries, memory, room)
    return sum((rows.stop - rows.start) * scores.shape[-1] for rows, _, scores in blocks)


@pytest.mark.parametrize("room", [1, 4 * HEADS * 6 * 40, 2**20])
@pytest.mark.parametrize("seed", range(6))
def test_after_resets_a_search_scores_what_is_there(seed: int, room: int) -> None:
    """Equal to the reference; and few slots are scored for nothing."""
    torch.manual_seed(seed)
    memory = Memory(6, HEADS, 40, WIDTH)
    fewer = 0
    for _ in range(30):
        queries = torch.randn(6, HEADS, 6, WIDTH)
        truth = reference_search(queries, memory, 4)
        for found in (
            ExactSearch(room)._on_device(queries, memory, 4),
            torch_buckets(queries, memory, 4, 40, room),
        ):
            assert torch.equal(found.valid, truth.valid)
            there = found.slots.masked_fill(~truth.valid, 0)
            assert torch.equal(there, truth.slots.masked_fill(~truth.valid, 0))
        count, used = scored(queries, memory, room), int(memory.used.sum())
        assert used <= count <= 1.25 * used
        fewer += count < 6 * memory.max_fill
        memory.reset(torch.rand(6) < 0.2)
        memory.write(*random_segment(6, 5)[:2])
    assert fewer > 10


def test_rows_are_scored_together_if_little_is_wasted() -> None:
    assert [*runs([7, 8, 7])] == [(slice(0, 3), 8)]
    assert [*runs([0, 8, 2, 0, 0, 5])] == [(slice(1, 2), 8), (slice(2, 3), 2), (slice(5, 6), 5)]
    assert [*runs([])] == [*runs([0, 0])] == []
    assert [*runs([1, 9, 1], waste=99.0)] == [(slice(0, 3), 9)]


def test_repeats_are_found_elsewhere_without_a_wait() -> None:
    """Also after resets, padding, several writes between two searches, and a rewound memory."""
    here, search, other = Memory(ROWS, HEADS, 12, WIDTH), RepeatSearch(), RepeatSearch()
    with two_devices("cuda"):
        away = Memory(ROWS, HEADS, 12, WIDTH, device=AWAY)
        for step in range(9):
            forget = torch.rand(ROWS) < 0.2
            keys, values, mask, ids = random_segment(ROWS, 5, padded=step % 3 == 0)
            ids = ids % 2
            moved = [x.to(AWAY) for x in (forget, keys, values, mask, ids)]
            with Waits() as waits:
                away.reset(moved[0], forget)
                found = other(moved[4], away) if step % 4 else None
                away.write(*moved[1:])
            assert step == 1 or waits.seen == []  # the first call makes its tables
            here.reset(forget)
            expected = search(ids, here) if step % 4 else None
            here.write(keys, values, mask, ids)
            for one, two in zip(found or (), expected or (), strict=True):
                assert torch.equal(one.to("cpu"), two)
            if step == 5:
                start = here.written - 3
                with here.rewound(start.clamp(min=0)), away.rewound(start.clamp(min=0).to(AWAY)):
                    here.write(keys, values, mask, ids)
                    away.write(*moved[1:])
