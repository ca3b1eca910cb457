"""Schedules in numbers, and what each optimiser may touch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.training.optimizers import (
    OPTIMIZERS,
    OptimizerConfig,
    is_memory_number,
    lr_factor,
    make_optimizer,
    make_schedule,
)


class Net(nn.Module):
    """A matrix, a vector and a frozen vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4))
        self.vector = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self) -> torch.Tensor:
        return (self.matrix @ self.vector).square().sum()


def rates(steps: int, **settings: Any) -> list[float]:
    """The learning rate of every step, from a real optimiser and its schedule."""
    config = OptimizerConfig(**settings)
    optimizer = make_optimizer(Net(), config)
    schedule = make_schedule(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_papers_schedule() -> None:
    config = OptimizerConfig("adafactor", lr=1.0, schedule="rsqrt", warmup_steps=1000)
    rate = lr_factor(config, total_steps=0)
    assert rate(1_000) == pytest.approx(0.0316, abs=5e-5)
    assert rate(500_000) == pytest.approx(0.0014, abs=5e-5)
    assert rate(4_000) == pytest.approx(rate(1_000) / 2)
    # Linear before: half the rate at half the warm-up.
    assert rate(499) == pytest.approx(rate(999) / 2)
    assert max(rate(step) for step in range(3_000)) == rate(999)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "rsqrt"])
def test_the_warm_up_rises_linearly_and_never_stands_at_zero(schedule: str) -> None:
    seen = rates(20, lr=0.5, schedule=schedule, warmup_steps=5)
    peak = seen[4]
    assert seen[:5] == pytest.approx([peak * (step + 1) / 5 for step in range(5)])


def test_a_constant_schedule_stays() -> None:
    assert rates(9, lr=0.5, schedule="constant", warmup_steps=3)[2:] == [0.5] * 7


def test_cosine_falls_to_its_final_share() -> None:
    config = OptimizerConfig(lr=0.5, schedule="cosine", warmup_steps=4, final_lr_share=0.1)
    rate = lr_factor(config, total_steps=104)
    assert rate(4) == 1.0
    assert rate(54) == pytest.approx(0.55)  # half-way between 1 and the final share
    assert rate(104) == rate(1_000) == pytest.approx(0.1)
    falling = [rate(step) for step in range(4, 105)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_ends_at_total_steps_rather_than_the_trainers_last() -> None:
    settings = {"lr": 1.0, "warmup_steps": 0, "final_lr_share": 0.0, "total_steps": 10}
    seen = rates(20, **settings)
    assert seen[9] > 0
    assert seen[10:] == [0.0] * 10


@pytest.mark.parametrize(
    ("max_steps", "message"),
    [(-1, r"total_steps = None: .*trainer\.max_steps"), (0, r"^trainer\.max_steps = 0: ")],
)
def test_cosine_without_an_end_is_refused(max_steps: int, message: str) -> None:
    config = OptimizerConfig(schedule="cosine")
    with pytest.raises(ConfigError, match=message):
        make_schedule(make_optimizer(Net(), config), config, max_steps)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_steps_lower_the_loss_and_leave_frozen_parameters_alone(name: Any) -> None:
    net = Net()
    config = OptimizerConfig(name, lr=0.05, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, -1)
    first = net().item()
    for _ in range(5):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
        schedule.step()
    assert math.isfinite(net().item())
    assert net().item() < first
    assert torch.equal(net.frozen, torch.ones(4))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(net.matrix), id(net.vector)}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weight_decay_shrinks_matrices_alone(name: Any) -> None:
    net = Net()
    optimizer = make_optimizer(net, OptimizerConfig(name, lr=0.1, weight_decay=0.5))
    for parameter in (net.matrix, net.vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(net.matrix, torch.full((3, 4), 0.95))
    assert torch.equal(net.vector, torch.ones(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0: must be above 0"),
        ({"lr": -1.0}, "lr = -1.0: must be above 0"),
        ({"lr": math.nan}, "lr = nan: must be above 0"),
        ({"lr": math.inf}, "lr = inf: must be a finite number"),
        ({"weight_decay": math.nan}, "weight_decay = nan: must be a finite number"),
        ({"weight_decay": math.inf}, "weight_decay = inf: must be a finite number"),
        *(
            (
                {"memory_lr_factor": x},
                f"memory_lr_factor = {x}: must be finite and at least 0; 1 is "
                "the rate of all others",
            )
            for x in (-1.0, math.nan, math.inf)
        ),
        ({"warmup_steps": -1}, "warmup_steps = -1: must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas = (0.9, 1.0): each must lie in [0, 1)"),
        ({"final_lr_share": 1.5}, "final_lr_share = 1.5: must lie in [0, 1]"),
        ({"total_steps": -3}, "total_steps = -3: must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**settings).validate()
    assert str(caught.value) == f"model.optimizer.{message}"


WITH_NUMBERS: dict[str, Any] = {
    "copy": ["neighbours", "repeats"],
    "match_length": 3,
    "temperature": True,
}
KERNELS = ("gate.hidden", "gate.linear.weight", "neighbours.hidden")
"""Of the memory's parameters those that read hidden states, and have two dimensions."""


@pytest.mark.parametrize("factor", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("bias", ["t5", "learned-absolute", "log"])
@pytest.mark.parametrize("combine", ["gate", "content", "joint-bias", "evidence"])
def test_the_memorys_numbers_never_decay(combine: Any, bias: Any, name: str, factor: float) -> None:
    memory = {"size": 8, "top_k": 2, "combine": combine, "position_bias": bias, **WITH_NUMBERS}
    net = Transformer(ModelConfig(23, 16, 2, 4, memory=memory))
    of_memory = {id(parameter) for parameter in net.memory_parameters()}
    own = {n: p for n, p in net.named_parameters() if id(p) in of_memory}
    config = OptimizerConfig(name, lr=0.1, weight_decay=0.5, memory_lr_factor=factor)
    optimizer = make_optimizer(net, config)
    before = {n: p.detach().clone() for n, p in own.items()}
    with torch.no_grad():
        for parameter in own.values():
            parameter += 1.0  # not 0, which would decay to 0
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {n for n, p in own.items() if not torch.equal(p, before[n] + 1.0)}
    assert decayed == {n for n in own if n.endswith(KERNELS)}


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 30.0])
def test_any_finite_rate_of_the_memory_is_accepted(factor: float) -> None:
    OptimizerConfig(memory_lr_factor=factor).validate()


DECOUPLED = ["adamw", "muon", "adafactor"]
DECOUPLED += [f"torch.optim.{kind}" for kind in ("Adam", "AdamW", "NAdam", "RAdam", "Adafactor")]


@pytest.mark.parametrize("name", DECOUPLED)
def test_the_decay_is_a_share_of_each_weight(name: str) -> None:
    """Times the learning rate, whatever the gradients: of large weights as of small ones."""
    net = Net()
    with torch.no_grad():
        net.matrix[0] = 10.0
    optimizer = make_optimizer(net, OptimizerConfig(name, lr=0.01, weight_decay=0.5))
    before = net.matrix.detach().clone()
    for parameter in (net.matrix, net.vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(net.matrix, before * (1 - 0.01 * 0.5))


def test_a_decay_that_an_optimiser_lacks_is_refused() -> None:
    OptimizerConfig("torch.optim.Rprop", weight_decay=0.0).validate()
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig("torch.optim.Rprop").validate()
    assert caught.value.key == "model.optimizer.weight_decay"


def test_options_may_ask_for_the_other_decay() -> None:
    config = OptimizerConfig("torch.optim.NAdam", options={"decoupled_weight_decay": False})
    assert not make_optimizer(Net(), config).param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas"])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "torch.optim.SGD"])
def test_no_option_is_passed_over_for_a_key_of_its_own(name: str, key: str) -> None:
    value = (0.5, 0.5) if key == "betas" else 0.5
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(name, options={key: value}).validate()
    assert caught.value.key == "model.optimizer.options"
    own = key != "betas" or name in ("adamw", "muon")
    assert (f"set model.optimizer.{key}" in str(caught.value)) == own


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
@pytest.mark.parametrize("lr", [0.01, 1.0])
@pytest.mark.parametrize("factor", [0.0, 0.5, 10.0])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_memorys_numbers_move_by_a_multiple_in_every_step(
    name: str, factor: float, lr: float, schedule: Any
) -> None:
    """Also where the optimiser bounds the rate, as Adafactor does."""
    moves = []
    for multiple in (1.0, factor):
        torch.manual_seed(0)
        net = Transformer(ModelConfig(23, 16, 2, 4, memory={"size": 8, "top_k": 2}))
        settings: dict[str, Any] = {"lr": lr, "schedule": schedule, "warmup_steps": 3}
        config = OptimizerConfig(name, memory_lr_factor=multiple, weight_decay=0.0, **settings)
        optimizer = make_optimizer(net, config)
        rates = make_schedule(optimizer, config, 12)
        gate = next(p for n, p in net.named_parameters() if is_memory_number(n))
        moves.append([])
        for step in range(12):
            with torch.no_grad():
                gate.fill_(1.0)  # by which Adafactor scales its move
            gate.grad = torch.full_like(gate, math.cos(step))
            optimizer.step()
            rates.step()
            moves[-1].append((gate.detach() - 1.0).mean().item())
    for one, many in zip(*moves, strict=True):
        assert many == pytest.approx(factor * one, rel=1e-3, abs=1e-6)


def test_a_multiple_that_an_optimiser_would_bound_is_refused() -> None:
    OptimizerConfig("torch.optim.Adafactor").validate()
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig("torch.optim.Adafactor", memory_lr_factor=10).validate()
    assert caught.value.key == "model.optimizer.memory_lr_factor"


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("torch.optim.NAdam", torch.optim.NAdam, {"momentum_decay": 0.01}),
        ("torch.optim.SGD", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adamw", torch.optim.AdamW, {"eps": 1e-4}),
    ],
)
def test_any_optimiser_by_its_class_with_our_groups(
    name: str, kind: type, options: dict[str, Any]
) -> None:
    config = OptimizerConfig(name, lr=0.5, weight_decay=0.3, options=options)
    config.validate()
    net = Net()
    optimizer = make_optimizer(net, config)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in options} == options
        assert group["lr"] == 0.5
    net().backward()
    before = [net.matrix.clone(), net.vector.clone(), net.frozen.clone()]
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "adam"}, "model.optimizer.name"),
        ({"name": "torch.optim.Nope"}, "model.optimizer.name"),
        ({"name": "torch.nn.Linear"}, "model.optimizer.name"),
        ({"name": "no.such.Optimizer"}, "model.optimizer.name"),
        ({"name": "."}, "model.optimizer.name"),
        ({"name": "torch.optim.LBFGS", "weight_decay": 0.0}, "model.optimizer.options"),
        ({"name": "torch.optim.Muon"}, "model.optimizer.name"),
        ({"name": "torch.optim.SparseAdam", "weight_decay": 0.0}, "model.optimizer.name"),
        *(
            ({"name": "muon", "options": options}, "model.optimizer.options")
            for options in ({"momentum": 2.0}, {"momentum": -0.1}, {"ns_steps": 0})
        ),
        ({"options": {"momentum": 0.9}}, "model.optimizer.options"),
        ({"options": {"eps": -1.0}}, "model.optimizer.options"),
        ({"name": "torch.optim.SGD", "betas": (0.5, 0.5)}, "model.optimizer.betas"),
    ],
)
def test_what_is_no_optimiser_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**settings).validate()
    assert caught.value.key == key


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_every_optimizer_with_a_short_name_takes_the_defaults(name: str) -> None:
    OptimizerConfig(name=name).validate()
