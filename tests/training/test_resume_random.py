"""Random states come back when a run resumes, also on other devices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memorizing_transformers.training.checkpoint import rank_state
from memorizing_transformers.training.checkpoint.rank_state import (
    random_state,
    set_random_state,
)


def draw() -> list[Any]:
    return [
        torch.rand(3).tolist(),
        [random.random(), random.gauss(0, 1), random.gauss(0, 1), random.gauss(0, 1)],
        [*np.random.rand(2), *np.random.standard_normal(3), *np.random.rand(2)],
    ]


@pytest.mark.parametrize("before", range(4))
def test_random_states_come_back_with_a_pending_gaussian_and_without(before: int) -> None:
    random.seed(0)
    np.random.seed(0)
    if before % 2:
        random.gauss(0, 1)
    if before // 2:
        np.random.randn(1)
    legacy: Any = np.random.get_state()
    assert bool(legacy[3]) == bool(before // 2)
    saved = {name: value.clone() for name, value in random_state().items()}
    first = draw()
    draw()
    set_random_state(saved)
    assert draw() == first
    # From another process, which has drawn otherwise.
    random.gauss(0, 1), np.random.randn(1)
    set_random_state(saved)
    assert draw() == first


class Generator:
    """What ``torch.cuda`` offers, with so many devices."""

    def __init__(self, count: int, current: int) -> None:
        self.states = [torch.full((4,), index, dtype=torch.uint8) for index in range(count)]
        self.current = current

    def current_device(self) -> int:
        return self.current

    def get_rng_state(self) -> Tensor:
        return self.states[self.current]

    def set_rng_state(self, value: Tensor) -> None:
        self.states[self.current] = value


@pytest.mark.parametrize("now", [(1, 0), (8, 3), (4, 1)])
@pytest.mark.parametrize("old", [False, True])
def test_the_state_of_the_device_in_use_comes_back_on_other_devices(
    now: tuple[int, int], old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = Generator(8, 3), Generator(*now)
    monkeypatch.setattr(rank_state, "_devices", lambda: {"cuda": before})
    before.states[3] = torch.full((4,), 33, dtype=torch.uint8)
    saved = random_state()
    if old:  # every device by its number
        del saved["cuda"]
        saved |= {f"cuda.{index}": value + 40 for index, value in enumerate(before.states)}
    monkeypatch.setattr(rank_state, "_devices", lambda: {"cuda": after})
    set_random_state(saved)
    expected = saved[f"cuda.{now[1]}"] if old else before.states[3]
    assert torch.equal(after.states[now[1]], expected)
    others = [value for index, value in enumerate(after.states) if index != now[1]]
    assert all(int(value[0]) < 8 for value in others)
    # Where there is no such device it is left out.
    monkeypatch.setattr(rank_state, "_devices", dict)
    set_random_state(saved)
