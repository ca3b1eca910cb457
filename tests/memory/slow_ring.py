"""A list that appends and keeps the last M: what a ring is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing_transformers.memory import Memory
from memorizing_transformers.memory.storage import quantize, restore

HEADS, WIDTH = 2, 3


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
