"""Resuming a saved optimiser: its state by parameter, with the settings of the current config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import count, product
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ...errors import ConfigError, UserError
from ...model import MemorizingNet
from ...model.renamed import current_name, in_current_shape
from ..optimizers import (
    OptimizerConfig,
    end_of_schedule,
    lr_factor,
    make_optimizer,
    parameter_groups,
)

SETTINGS_KEY = "optimizer_settings"
"""Where a checkpoint keeps the fields of ``OptimizerConfig``."""


def saved_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``OptimizerConfig`` that a checkpoint was written with.

    One without a note of them tells those that its optimiser keeps.
    """
    if SETTINGS_KEY in checkpoint:
        return dict(checkpoint[SETTINGS_KEY])
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    found = {"name": "adamw" if "betas" in group else "adafactor"}
    found |= {key: group[key] for key in ("betas", "weight_decay") if key in group}
    return {**found, "lr": checkpoint["lr_schedulers"][0]["base_lrs"][0]}


def changed_settings(checkpoint: dict[str, Any], config: OptimizerConfig) -> list[str]:
    """What differs from the run that wrote a checkpoint, as ``KEY = NOW (checkpoint: THEN)``.

    Raises:
        ConfigError: where the optimiser is another one, which can't use the state.
    """
    now, then = asdict(config), saved_settings(checkpoint)
    if then["name"] != config.name:
        remedy = (
            f"the checkpoint was written with {then['name']}, whose state does not fit; give that, "
            "or begin a new run with its weights alone: model.init_from instead of ckpt_path"
        )
        raise ConfigError("model.optimizer.name", config.name, remedy)
    then["betas"] = tuple(then.get("betas", config.betas))
    return [
        f"model.optimizer.{key} = {now[key]} (checkpoint: {then[key]})"
        for key in now
        if key in then and then[key] != now[key]
    ]


def _names(groups: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def _trained_names(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    memory: set[int],
    with_memory: bool,
    by_shape: bool,
) -> list[list[str]]:
    """By group, the names of the parameters that a run trains, with a memory or without.

    ``by_shape`` is that of ``parameter_groups``."""
    named = [
        (name, parameter)
        for name, parameter in named
        if (with_memory if id(parameter) in memory else parameter.requires_grad)
    ]
    return _names(parameter_groups(named, config, by_shape))


def _in_current_shape(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state; its step has no dimension, whatever the parameter's shape."""
    moments = {k: x for k, x in state.items() if k != "step" and torch.is_tensor(x)}
    return {**state, **{key: in_current_shape(name, x) for key, x in moments.items()}}


def take_over(
    checkpoint: dict[str, Any], net: MemorizingNet, config: OptimizerConfig, max_steps: int
) -> None:
    """Rewrite the optimiser's and the schedule's state so that this run's can load it, in place.

    A memory that was switched on or off brings parameters or takes them away: the others keep their
    state, new ones begin without. Learning rate, decay and betas become those of the config.

    Args:
        checkpoint: as loaded.
        net: the network, its parameters frozen where they are not trained.
        config: the optimiser and schedule from now on.
        max_steps: the trainer's.

    Raises:
        UserError: where the state is that of other parameters.
    """
    changed = changed_settings(checkpoint, config)
    if changed:
        rank_zero_info(f"Resuming with other settings from here on: {', '.join(changed)}")
    (state,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    memory = {id(parameter) for parameter in net.memory_parameters()}
    numbers = [group["params"] for group in state["param_groups"]]
    # The optimiser numbered the parameters in the order of the weights of its own version.
    order = [current_name(name).removeprefix("net.") for name in checkpoint["state_dict"]]
    present = dict(net.named_parameters())
    as_saved = [(name, present[name]) for name in order if name in present]
    # The memory's own numbers were a group of their own, or were not.
    fewest = 3 if config.name == "muon" else 2
    grouped = replace(config, memory_lr_factor=1.0 if len(numbers) == fewest else 2.0)
    for with_memory, by_shape in product((True, False), (False, True)):
        names = _trained_names(as_saved, grouped, memory, with_memory, by_shape)
        if [*map(len, names)] == [*map(len, numbers)]:
            break
    else:
        raise UserError(
            "ckpt_path: its optimiser trained other parameters, so its state does not fit; begin a "
            "new run with its weights alone: model.init_from instead of ckpt_path"
        )
    known = {
        name: _in_current_shape(name, state["state"][number])
        for group, members in zip(numbers, names, strict=True)
        for number, name in zip(group, members, strict=True)
        if number in state["state"]
    }
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    live = parameter_groups(trained, config)
    factor = lr_factor(config, end_of_schedule(config, max_steps))
    share = factor(schedule["last_epoch"])
    defaults = make_optimizer(net, config).param_groups
    values: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    number = count(0)
    first = state["param_groups"][0]
    for group, own in zip(live, defaults, strict=True):
        options = {key: value for key, value in own.items() if key != "params"}
        members = [next(number) for _ in group["params"]]
        settings: dict[str, Any] = {"lr": group["lr"] * share, "initial_lr": group["lr"]}
        groups.append({**first, **options, **settings, "params": members})
        for member, (name, _) in zip(members, group["params"], strict=True):
            if name in known:
                values[member] = known[name]
    checkpoint["optimizer_states"] = [{"state": values, "param_groups": groups}]
    bases = [group["lr"] for group in live]
    rates = {"base_lrs": bases, "_last_lr": [base * share for base in bases]}
    checkpoint["lr_schedulers"] = [{**schedule, **rates}]
