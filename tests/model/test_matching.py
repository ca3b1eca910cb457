"""Match lengths of retrieved pairs are those of the texts."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers.memory import Memory
from memorizing_transformers.model.matching import match_lengths


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("size", "segment"), [(20, 6), (7, 9), (64, 4)])
def test_they_are_those_of_a_slow_count(size: int, segment: int, shift: int) -> None:
    """Over resets, padding, and a ring that is written over many times."""
    generator = torch.Generator().manual_seed(size)
    memory, texts, longest, seen = Memory(2, 1, size, 2), [[], []], 5, set()
    pairs = torch.zeros(2, 1, segment, 2)
    for turn in range(16):
        if turn == 9:
            memory.reset(torch.tensor([False, True]))
            texts[1] = []
        ids = torch.randint(0, 2, (2, segment), generator=generator)
        slots = torch.arange(size).expand(2, 3, segment, size)
        lengths = match_lengths(ids, memory, slots, longest, shift)
        for row, text in enumerate(texts):
            known, first = text + ids[row].tolist(), max(0, len(text) - size)
            for number in range(first, len(text)):
                slot = number % size
                for token in range(segment):
                    now, then, length = len(text) + token, number - shift, 0
                    while length < longest and min(then, now) - length >= first:
                        if known[then - length] != known[now - length]:
                            break
                        length += 1
                    assert lengths[row, :, token, slot].tolist() == [length] * 3
                    seen.add(length)
        mask = torch.arange(segment) < torch.randint(1, segment + 1, (2, 1), generator=generator)
        memory.write(pairs, pairs, mask, ids)
        for row, text in enumerate(texts):
            text += ids[row, mask[row]].tolist()
    assert seen == {*range(longest + 1)}
