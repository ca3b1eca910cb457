"""Plans of ablations: a base, variants that differ from it in what they name, seeds, a budget."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from memorizing_transformers.data.sources.splits import check_sources
from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.failures import describe
from memorizing_transformers.training.cli import MemoryCLI, read_config

BASE = "base"
"""The variant that is the base itself; every plan has it."""

LEAST_MINUTES, MOST_MINUTES = 1 / 60, 366 * 24 * 60
LONGEST_REASON = 300
"""Characters of what the parser says; it may quote a whole file."""


@dataclass(frozen=True)
class Budget:
    """How long a variant trains: one of the two.

    Args:
        tokens: token places, padding included; a step has accumulate_grad_batches × batch_rows ×
            segment_length of them.
        minutes: of training, validation included; learning rates that need an end keep the base's.
    """

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        one = (self.tokens is None) != (self.minutes is None)
        whole = self.tokens is None or (type(self.tokens) is int and self.tokens > 0)
        number = self.minutes is None or (
            type(self.minutes) in (int, float) and LEAST_MINUTES <= self.minutes <= MOST_MINUTES
        )
        if not (one and whole and number):
            remedy = (
                "give tokens (a whole number above 0) or minutes (a second to a year), one of them"
            )
            raise ConfigError("budget", vars(self), remedy)


@dataclass(frozen=True)
class Variant:
    """The base with some keys changed.

    Args:
        name: of its folder and its line in the table.
        overrides: values by the dotted keys of a config.
        run: train it, or only evaluate weights that another variant trained.
        source: the variant whose weights it starts from (``from`` in the plan); for run=evaluate
            the base unless given, for run=train none, which starts as the base does.
        budget: of a variant that starts from another's weights; the plan's unless given.
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
        variants: with the base first.
        budget: of every variant that is trained from the start.
        overrides: changes of the base itself, which all variants share.
        seeds: of initial weights and document order, each variant once with each.
        reference: the variant that the table holds the others against.
        split: what the table is about, test or validation.
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
        """What a variant sets over the base config, the budget's part left out."""
        own = {"seed_everything": seed, "data.seed": seed, "final_report": False}
        device = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
        return {**self.overrides, **variant.overrides, **own, **device}

    def limits(self, variant: Variant, cli: MemoryCLI) -> dict[str, Any]:
        """The budget of a variant as keys of the trainer.

        Raises:
            ConfigError: where it is less than one step, or the base has a limit of its own.
        """
        budget = variant.budget or self.budget
        trainer = cli.config["trainer"]
        for key, none in (("max_time", None), ("max_epochs", -1), ("fast_dev_run", False)):
            if trainer[key] not in (None, none):
                remedy = "take it out of the base; the plan's budget says how long to train"
                raise ConfigError(f"trainer.{key}", trainer[key], remedy)
        scheduler = GradientAccumulationScheduler
        if any(isinstance(one, scheduler) for one in cli.trainer.callbacks):
            remedy = "accumulates more in some epochs; set trainer.accumulate_grad_batches instead"
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
            remedy = f"less than one step ({places}); give at least as many"
            raise ConfigError("budget.tokens", budget.tokens, remedy)
        return {"trainer.max_steps": budget.tokens // places}


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of the training command line."""
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"--{key}={value}" for key, value in plain.items()]


def build(plan: Plan, variant: Variant, seed: int) -> tuple[MemoryCLI, dict[str, Any]]:
    """A variant's model and data, built but for the network, and every value of its config, budget
    included, by dotted key; nothing is run.

    Raises:
        UserError: naming the variant and what cannot work.
    """
    settings = plan.settings(variant, seed)
    said = io.StringIO()
    # Lightning tells every seed that it sets.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(said):
            cli = read_config(plan.base, arguments(settings))
            limits = plan.limits(variant, cli)
            check_sources(cli.datamodule.settings.sources, plan.split)
    except SystemExit as stop:
        # The parser prints what it has to say.
        reason = shorten(said.getvalue().removeprefix("error: "), LONGEST_REASON)
        raise UserError(f"variants.{variant.name}: {reason}") from stop
    except Exception as error:
        raise UserError(f"variants.{variant.name}: {describe(error)[0]}") from error
    finally:
        logging.disable(logging.NOTSET)
    found = {key: _plain(value) for key, value in vars(cli.config.as_flat()).items()}
    # The path of the base itself is no setting.
    found.pop("config", None)
    return cli, {**found, **settings, **limits}


def resolve(plan: Plan, variant: Variant, seed: int) -> dict[str, Any]:
    """Every value of a variant's config, as ``build`` finds them."""
    return build(plan, variant, seed)[1]


def _plain(value: Any) -> Any:
    """A value as JSON keeps it."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def check(plan: Plan) -> dict[str, dict[str, Any]]:
    """The resolved config of every variant, with the first seed.

    Raises:
        UserError: where one cannot work.
    """
    return {variant.name: resolve(plan, variant, plan.seeds[0]) for variant in plan.variants}
