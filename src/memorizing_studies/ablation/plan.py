"""A plan of ablations: a base config, variants that change some of its keys, seeds, a budget."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from memorizing_transformers.data.sources.splits import check_sources
from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.failures import describe
from memorizing_transformers.model import Transformer
from memorizing_transformers.training.cli import MemoryCLI, read_config
from memorizing_transformers.training.module import MemorizingLM

from .taken_weights import matching

BASE = "base"
"""The name of the variant that changes nothing; every plan has it."""

LEAST_MINUTES, MOST_MINUTES = 1 / 60, 366 * 24 * 60
LONGEST_REASON = 300
"""Characters of an error of the parser, which may quote a complete file."""


@dataclass(frozen=True)
class Budget:
    """How long a variant trains: a number of tokens or of minutes.

    Args:
        tokens: tokens, padding included. One optimiser step has accumulate_grad_batches ×
            batch_rows × segment_length of them.
        minutes: minutes of training, validation included. A learning rate schedule that needs a
            last step takes the base's ``trainer.max_steps``.

    Raises:
        ConfigError: if not exactly one is given, or it is out of range.
    """

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        one = (self.tokens is None) != (self.minutes is None)
        tokens = self.tokens is None or (type(self.tokens) is int and self.tokens > 0)
        minutes = self.minutes is None or (
            type(self.minutes) in (int, float) and LEAST_MINUTES <= self.minutes <= MOST_MINUTES
        )
        if not (one and tokens and minutes):
            remedy = "give either tokens (an integer above 0) or minutes (a second to a year)"
            raise ConfigError("budget", vars(self), remedy)


@dataclass(frozen=True)
class Variant:
    """The base with some keys changed.

    Args:
        name: the name of its folder and of its row in the table.
        overrides: config values by dotted key.
        run: train it, or only evaluate weights that another variant trained.
        source: the variant whose weights it starts from; its key in the plan is ``from``. Default:
            the base for run=evaluate; for run=train None, which means new weights.
        budget: its own budget, allowed only for a variant that is trained from another's weights.
            None: the plan's.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    run: Literal["train", "evaluate"] = "train"
    source: str | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Args:
        base: path of the base config.
        variants: the variants, the base first.
        budget: how long each variant trains that has no budget of its own.
        overrides: changes of the base config that all variants share.
        seeds: seeds of initial weights and document order. Each variant runs once with each seed.
        reference: the variant that the table compares the others with.
        split: the split that is evaluated, test or validation.
        out: folder of the runs and the results.
    """

    base: str
    variants: tuple[Variant, ...]
    budget: Budget
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    reference: str = BASE
    split: Literal["test", "validation"] = "test"
    out: str = "runs/ablations"

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def settings(self, variant: Variant, seed: int) -> dict[str, Any]:
        """What a variant sets over the base config, except the keys of its budget."""
        own = {"seed_everything": seed, "data.seed": seed, "final_report": False}
        device = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
        return {**self.overrides, **variant.overrides, **own, **device}

    def limits(self, variant: Variant, cli: MemoryCLI) -> dict[str, Any]:
        """The budget of a variant as keys of the trainer.

        Raises:
            ConfigError: if the budget is less than one step, or the base has another limit.
        """
        budget = variant.budget or self.budget
        trainer = cli.config["trainer"]
        for key, none in (("max_time", None), ("max_epochs", -1), ("fast_dev_run", False)):
            if trainer[key] not in (None, none):
                remedy = "remove it from the base; the plan's budget sets how long to train"
                raise ConfigError(f"trainer.{key}", trainer[key], remedy)
        scheduler = GradientAccumulationScheduler
        if any(isinstance(one, scheduler) for one in cli.trainer.callbacks):
            remedy = "changes the tokens of a step; set trainer.accumulate_grad_batches instead"
            raise ConfigError("trainer.callbacks", scheduler.__name__, remedy)
        if budget.tokens is None:
            assert budget.minutes is not None
            minutes, seconds = divmod(round(60 * budget.minutes), 60)
            hours, minutes = divmod(minutes, 60)
            days, hours = divmod(hours, 24)
            return {"trainer.max_time": f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}"}
        places = cli.datamodule.batch_rows * cli.datamodule.segment_length
        places *= int(trainer["accumulate_grad_batches"])
        if budget.tokens < places:
            remedy = f"less than one step ({places}); give at least that many"
            raise ConfigError("budget.tokens", budget.tokens, remedy)
        return {"trainer.max_steps": budget.tokens // places}


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of the training command line."""
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"--{key}={value}" for key, value in plain.items()]


def build(plan: Plan, variant: Variant, seed: int) -> tuple[MemoryCLI, dict[str, Any]]:
    """Build a variant's model and data, except the network; nothing is run.

    Returns:
        the command line with module and data, and every config value by dotted key, the budget
        included.

    Raises:
        UserError: naming the variant and the setting that cannot work.
    """
    settings = plan.settings(variant, seed)
    printed = io.StringIO()
    # Lightning logs every seed that it sets.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(printed):
            cli = read_config(plan.base, arguments(settings))
            limits = plan.limits(variant, cli)
            check_sources(cli.datamodule.settings.sources, plan.split)
    except SystemExit as stop:
        # The parser has printed the error.
        reason = shorten(printed.getvalue().removeprefix("error: "), LONGEST_REASON)
        raise UserError(f"variants.{variant.name}: {reason}") from stop
    except Exception as error:
        raise UserError(f"variants.{variant.name}: {describe(error)[0]}") from error
    finally:
        logging.disable(logging.NOTSET)
    return cli, {**_flat(cli.config), **settings, **limits}


def defaults(plan: Plan) -> dict[str, Any]:
    """Every config key that this version has, by its dotted name, with its default."""
    return _flat(read_config(plan.base).parser.get_defaults())


def _flat(config: Namespace) -> dict[str, Any]:
    found = {key: _plain(value) for key, value in vars(config.as_flat()).items()}
    # The path of the base is not a setting.
    found.pop("config", None)
    return found


def _plain(value: Any) -> Any:
    """The value as JSON stores it."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _network(module: MemorizingLM) -> Transformer | None:
    """The network of a variant without its numbers; None where only the run can build it."""
    if module.base is not None or type(module).build_net is not MemorizingLM.build_net:
        return None
    # Any vocabulary will do, since variants with other tokenizers are told apart by these.
    config = replace(module.config, vocab_size=module.config.vocab_size or 256)
    with torch.device("meta"):
        return Transformer(config)


def check(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every config value of each variant, by its name, with the first seed.

    Raises:
        UserError: if one cannot work, or cannot take over the weights that it starts from.
    """
    found, nets = {}, {}
    for variant in plan.variants:
        cli, found[variant.name] = build(plan, variant, plan.seeds[0])
        nets[variant.name] = _network(cli.model)
    for variant in plan.variants:
        net, source = nets[variant.name], nets.get(variant.source or "")
        if net is None or source is None:
            continue
        architecture = source.architecture()
        # Of a vocabulary that is not known yet, only the run can tell.
        architecture["vocab_size"] = net.architecture()["vocab_size"]
        try:
            matching(net, source.state_dict(), architecture, variant.run == "train")
        except UserError as error:
            raise UserError(f"variants.{variant.name}.{error}") from error
    return found
