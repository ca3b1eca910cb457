"""Optimisers and learning-rate schedules, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..errors import ConfigError, UserError
from .adafactor import Adafactor
from .muon import MuonWithAdamW, is_layer_matrix

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adafactor": Adafactor,
    "muon": MuonWithAdamW,
}
"""By their short names in ``model.optimizer.name``."""

UNFIT: dict[type[Optimizer], str] = {
    torch.optim.Muon: "takes matrices alone; set muon, which leaves the others to AdamW",
    torch.optim.SparseAdam: "takes sparse gradients alone, and there are none here; set adamw",
}
"""Those of torch that cannot train these models, and what to do instead."""


@dataclass
class OptimizerConfig:
    """Optimiser and schedule.

    Args:
        name: Optimiser: adamw, adafactor, muon, or the import path of another one, e.g.
            torch.optim.NAdam. muon updates the matrices of the layers, and AdamW all other
            parameters.
        lr: Learning rate at the end of the warm-up. With schedule=rsqrt the rate at step s is lr /
            sqrt(max(s, warmup_steps)), as in the paper, which uses lr = 1.0.
        memory_lr_factor: Learning rate of the memory's own numbers (gates, temperatures, biases on
            retrieved pairs, weights of the copy head) as a multiple of lr.
        options: Further arguments of the optimiser, e.g. {eps: 1.0e-6}.
        betas: The two decay rates of AdamW, also beside muon. Other optimisers take theirs from
            options.
        weight_decay: Decoupled weight decay (times lr) of all parameters with two or more
            dimensions: the kernels of linear layers, the embedding, the tables of local position
            biases. Norms, scales and the memory's own numbers do not decay. An optimiser by import
            path that knows no decoupled decay (SGD, RMSprop) applies its own, mostly L2.
        schedule: Learning-rate schedule after the linear warm-up: constant, cosine or rsqrt.
        warmup_steps: Length of the linear warm-up in steps.
        total_steps: Step at which the cosine schedule ends. Default: trainer.max_steps.
        final_lr_share: Learning rate at the end of the cosine schedule, as a share of lr.
    """

    name: str = "adamw"
    lr: float = 1e-3
    memory_lr_factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine", "rsqrt"] = "cosine"
    warmup_steps: int = 100
    total_steps: int | None = None
    final_lr_share: float = 0.05

    def validate(self, prefix: str = "model.optimizer.") -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: naming the field and what would do.
        """
        if not self.lr > 0:
            raise ConfigError(prefix + "lr", self.lr, "must be above 0")
        for key in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, key)):
                raise ConfigError(prefix + key, getattr(self, key), "must be a finite number")
        if not 0 <= self.memory_lr_factor < math.inf:
            remedy = "must be finite and at least 0; 1 is the rate of all others"
            raise ConfigError(prefix + "memory_lr_factor", self.memory_lr_factor, remedy)
        if self.total_steps is not None and self.total_steps < 1:
            raise ConfigError(prefix + "total_steps", self.total_steps, "must be at least 1")
        if self.warmup_steps < 0:
            raise ConfigError(prefix + "warmup_steps", self.warmup_steps, "must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(prefix + "betas", self.betas, "each must lie in [0, 1)")
        if not self.has_betas and tuple(self.betas) != OptimizerConfig.betas:
            remedy = f"are AdamW's; leave them out, or set {prefix}name=adamw"
            raise ConfigError(prefix + "betas", self.betas, remedy)
        if not 0 <= self.final_lr_share <= 1:
            raise ConfigError(prefix + "final_lr_share", self.final_lr_share, "must lie in [0, 1]")
        if self.weight_decay < 0:
            raise ConfigError(prefix + "weight_decay", self.weight_decay, "must be at least 0")
        kind = self.kind()
        for unfit, remedy in UNFIT.items():
            if issubclass(kind, unfit):
                raise ConfigError(prefix + "name", self.name, remedy)
        if self.weight_decay and self.name not in OPTIMIZERS and not takes(kind, "weight_decay"):
            remedy = f"{kind.__name__} has no weight decay; set 0"
            raise ConfigError(prefix + "weight_decay", self.weight_decay, remedy)
        for key in ("lr", "weight_decay", *(("betas",) if self.has_betas else ())):
            if key in self.options:
                remedy = f"{key} has a key of its own; set {prefix}{key}"
                raise ConfigError(prefix + "options", self.options, remedy)
        bounded = issubclass(kind, torch.optim.Adafactor) and self.name != "adafactor"
        if bounded and self.memory_lr_factor != 1:
            remedy = f"does not reach behind the bound of {self.name} on its rate; set "
            remedy += f"{prefix}name=adafactor, or 1"
            raise ConfigError(prefix + "memory_lr_factor", self.memory_lr_factor, remedy)
        try:
            self.build([{"params": [nn.Parameter(torch.zeros(n, n))]} for n in (1, 2)])
        except (TypeError, ValueError, RuntimeError) as error:
            remedy = f"do not fit {kind.__name__} ({error})"
            raise ConfigError(prefix + "options", self.options, remedy) from error

    @property
    def has_betas(self) -> bool:
        """Whether AdamW is, or is part of, the optimiser."""
        return self.name in ("adamw", "muon")

    def kind(self) -> type[Optimizer]:
        """The class of the optimiser.

        Raises:
            ConfigError: where there is none of that name.
        """
        if self.name in OPTIMIZERS:
            return OPTIMIZERS[self.name]
        module, _, name = self.name.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            found = None
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            known = ", ".join(OPTIMIZERS)
            remedy = f"must be {known}, or the import path of an optimiser, e.g. torch.optim.NAdam"
            raise ConfigError("model.optimizer.name", self.name, remedy)
        return found

    def diverged(self, loss: float | None, step: int, in_half: bool = False) -> UserError:
        """The error of a loss that is not finite; None where weights are not.

        Args:
            loss: of the step, or None.
            step: its number.
            in_half: whether weights are in fp16, where AdamW's eps of 1e-8 is 0, and a lower rate
                does not help.
        """
        what = "weights are not finite" if loss is None else f"train/loss = {loss}"
        if in_half:
            return UserError(
                f"{what} at step {step}: trainer.precision = '16-true' holds weights and the "
                "optimiser's numbers in fp16, where small ones are 0; try bf16-mixed or 16-mixed; "
                "the last checkpoint is not affected"
            )
        return UserError(
            f"{what} at step {step}: try a lower model.optimizer.lr (now {self.lr}), "
            "a longer warm-up, or trainer.gradient_clip_val=1; the last checkpoint is not affected"
        )

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimiser over groups of parameters."""
        ours: dict[str, Any] = {"betas": self.betas} if self.has_betas else {}
        make: Callable[..., Optimizer] = self.kind()
        if "decoupled_weight_decay" in signature(make).parameters:
            ours["decoupled_weight_decay"] = True
        return make(groups, lr=self.lr, **{**ours, **self.options})


def takes(kind: type[Optimizer], argument: str) -> bool:
    """Whether a class takes an argument, as far as its signature tells."""
    parameters = signature(kind).parameters
    return argument in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def is_of_memory(name: str) -> bool:
    """Whether a parameter belongs to a reader of the memory or to the copy head."""
    return bool({"reader", "memory_reader", "copy_head"} & {*name.split(".")})


def is_memory_number(name: str) -> bool:
    """Whether a parameter is one of the memory's own numbers, and no kernel that reads tokens."""
    *path, last = name.split(".")
    return is_of_memory(name) and last != "hidden" and "linear" not in path


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, by_shape: bool = False
) -> list[dict[str, Any]]:
    """The groups of an optimiser: what has two dimensions or more decays.

    Vectors and the memory's own numbers do not.

    Args:
        named: the parameters with their names.
        config: tells the decay and the memory's learning rate.
        by_shape: as earlier versions did: the memory's numbers decay by their dimensions too,
            unless their learning rate is another one. To read their checkpoints.

    Returns:
        for each group ``params``, its pairs of name and parameter, ``weight_decay`` and ``lr``; the
        memory's own numbers are a third group if their learning rate is another one. With muon the
        last group has ``matrices``, and holds those of the layers.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": [], "weight_decay": 0.0, "lr": config.lr},
    ]
    if config.memory_lr_factor != 1:
        rate = config.lr * config.memory_lr_factor
        groups.append({"params": [], "weight_decay": 0.0, "lr": rate})
        if config.name == "adafactor":
            # Which bounds the rate: a multiple of lr alone would end at the bound of the others.
            groups[-1]["lr_factor"] = config.memory_lr_factor
    with_own_rate, with_muon = len(groups) > 2, config.name == "muon"
    if with_muon:
        groups.append({**groups[0], "params": [], "matrices": True})
    for name, parameter in named:
        own = is_memory_number(name)
        if own and (with_own_rate or not by_shape):
            group = groups[2 if with_own_rate else 1]
        elif with_muon and not own and is_layer_matrix(name, parameter):
            group = groups[-1]
        else:
            group = groups[int(parameter.ndim < 2)]
        group["params"].append((name, parameter))
    return groups


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser over the trainable parameters, in ``parameter_groups``."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {**group, "params": [parameter for _, parameter in group["params"]]}
        for group in parameter_groups(trainable, config)
    ]
    return config.build(groups)


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The schedule: maps the number of finished steps to a factor of ``config.lr``.

    Args:
        config: names the schedule.
        total_steps: where cosine ends.
    """
    warmup = max(1, config.warmup_steps)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup)
        if config.schedule == "rsqrt":
            return rise / math.sqrt(max(step, warmup))
        if config.schedule == "cosine":
            progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
            wave = 0.5 * (1 + math.cos(math.pi * progress))
            return rise * (config.final_lr_share + (1 - config.final_lr_share) * wave)
        return rise

    return factor


def end_of_schedule(config: OptimizerConfig, max_steps: int) -> int:
    """The step at which cosine ends.

    Raises:
        ConfigError: where cosine is asked for without an end.
    """
    total = config.total_steps or max_steps
    if config.schedule == "cosine" and total <= 0:
        if max_steps == 0:
            remedy = "cosine needs an end; give 1 or more, or set model.optimizer.total_steps"
            raise ConfigError("trainer.max_steps", max_steps, remedy)
        remedy = "cosine needs an end: set it, or trainer.max_steps"
        raise ConfigError("model.optimizer.total_steps", config.total_steps, remedy)
    return total


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    """The schedule of ``optimizer``, to be stepped after every optimiser step.

    Raises:
        ConfigError: where cosine is asked for without an end.
    """
    return LambdaLR(optimizer, lr_factor(config, end_of_schedule(config, max_steps)))
