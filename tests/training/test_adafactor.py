"""Adafactor against torch's own: the same updates to rounding, the same state, and no wait."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from two_devices import AWAY, Away, two_devices
from waits import Waits

from memorizing_transformers.training.adafactor import Adafactor

SHAPES = [(17, 9), (1, 5), (8,), (), (3, 6, 4), (2, 64)]


def make(kind: type, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[list, Any]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    parameters.append(nn.Parameter(torch.zeros(4, 7, dtype=dtype)))
    return parameters, kind(parameters, **settings)


def step(parameters: list, optimizer: Any, number: int) -> None:
    torch.manual_seed(number)
    for index, parameter in enumerate(parameters):
        scale = 10.0 ** (index - 3)  # of some the update is clipped
        parameter.grad = (torch.randn(parameter.shape) * scale).to(parameter)
    if number == 5:
        parameters[0].grad = None
    if number == 6:
        parameters[1].grad.zero_()
    optimizer.step()


CASES: list[dict[str, Any]] = [
    {},
    {"lr": 1.0},
    {"lr": 0.3, "weight_decay": 0.1, "d": 2.0},
    {"eps": (1e-6, 0.5), "beta2_decay": -0.5, "maximize": True},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_updates_and_state_are_those_of_torch(settings: dict[str, Any]) -> None:
    ours, optimizer = make(Adafactor, **settings)
    theirs, reference = make(torch.optim.Adafactor, **settings)
    for number in range(12):
        step(ours, optimizer, number)
        step(theirs, reference, number)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(
        optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kinds", [(torch.optim.Adafactor, Adafactor), (Adafactor,) * 2])
def test_a_checkpoint_of_either_continues(kinds: tuple[type, type]) -> None:
    whole, unbroken = make(Adafactor)
    begun, first = make(kinds[0])
    for number in range(4):
        step(whole, unbroken, number)
        step(begun, first, number)
    resumed, second = deepcopy(begun), kinds[1]
    optimizer = second(resumed)
    optimizer.load_state_dict(deepcopy(first.state_dict()))
    for number in range(4, 9):
        step(whole, unbroken, number)
        step(resumed, optimizer, number)
    for one, other in zip(whole, resumed, strict=True):
        if kinds[0] is Adafactor:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


def test_weights_in_bfloat16_move_by_the_same_amount() -> None:
    """To the rounding of bfloat16, in which torch's also rounds the norm."""
    ours, optimizer = make(Adafactor, torch.bfloat16, lr=0.5)
    theirs, reference = make(torch.optim.Adafactor, torch.bfloat16, lr=0.5)
    for number in range(3):
        step(ours, optimizer, number)
        step(theirs, reference, number)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_the_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = Adafactor([weight])

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0
    assert (weight < 1).all()


def test_no_step_waits_for_the_device() -> None:
    """And torch's own waits twice a parameter."""
    for kind, expected in ((Adafactor, 0), (torch.optim.Adafactor, 2 * len(SHAPES))):
        with two_devices("cuda"):
            weights = [nn.Parameter(Away(torch.randn(shape))) for shape in SHAPES]
            optimizer = kind(weights, weight_decay=0.1)
            for weight in weights:
                weight.grad = torch.ones_like(weight)
                assert weight.grad.device == AWAY
            with Waits() as waits:
                optimizer.step()
        assert len(waits.seen) == expected, waits.seen
