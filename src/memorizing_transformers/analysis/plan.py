"""Plans of ablations: a base, variants that differ from it in what they name, seeds, a budget."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..errors import ConfigError, UserError
from ..training.cli import MemoryCLI, read_config

BASE = "base"
"""The variant that is the base itself; every plan has it."""

OWNED = {
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "trainer.max_steps": "budget",
    "trainer.max_time": "budget",
    "trainer.max_epochs": "budget",
    "trainer.default_root_dir": "out",
    "trainer.logger": "out",
    "trainer.devices": "one device a variant",
    "trainer.num_nodes": "one device a variant",
    "trainer.strategy": "one device a variant",
    "final_report": "split",
    "ckpt_path": "from",
}
"""Keys of a config that a plan sets by itself, and what of the plan says so."""

NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Budget:
    """How long a variant trains: one of the two.

    Args:
        tokens: token places, padding included; a step has batch_rows × segment_length of them.
        minutes: of training, validation included; learning rates that need an end keep the base's.
    """

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        one = (self.tokens is None) != (self.minutes is None)
        whole = self.tokens is None or type(self.tokens) is int
        number = self.minutes is None or type(self.minutes) in (int, float)
        if not (one and whole and number and (self.tokens or self.minutes or 0) > 0):
            remedy = "give tokens (a whole number) or minutes, one of them, above 0"
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
        if trainer["max_time"] is not None:
            remedy = "take it out of the base; the budget stands for it"
            raise ConfigError("trainer.max_time", trainer["max_time"], remedy)
        if budget.tokens is None:
            assert budget.minutes is not None
            minutes, seconds = divmod(round(60 * budget.minutes), 60)
            hours, minutes = divmod(minutes, 60)
            days, hours = divmod(hours, 24)
            return {"trainer.max_time": f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}"}
        places = cli.datamodule.batch_rows * cli.datamodule.segment_length
        places *= int(trainer["accumulate_grad_batches"])
        if budget.tokens < places:
            raise ConfigError("budget.tokens", budget.tokens, f"less than one step ({places})")
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
    except SystemExit as stop:
        # The parser prints what it has to say.
        reason = said.getvalue().strip().removeprefix("error: ")
        raise UserError(f"variants.{variant.name}: {reason}") from stop
    except (ValueError, MisconfigurationException) as error:
        raise UserError(f"variants.{variant.name}: {error}") from error
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


def _known(kind: type, given: Any, where: str, renamed: str = "") -> dict[str, Any]:
    """A mapping of a plan's, its keys among the fields of ``kind``."""
    if not isinstance(given, dict):
        raise ConfigError(where, given, "must be a mapping")
    names = [renamed if f.name == "source" and renamed else f.name for f in fields(kind)]
    for key in given:
        if key not in names:
            raise ConfigError(where, key, f"no such key; there is {', '.join(names)}")
    return {"source" if key == renamed else key: value for key, value in given.items()}


def _overrides(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ConfigError(where, given, "must map dotted keys to values")
    for key, value in given.items():
        if key in OWNED:
            raise ConfigError(f"{where}.{key}", value, f"is the plan's own matter ({OWNED[key]})")
    return given


def _variant(given: Any, number: int) -> Variant:
    where = f"variants[{number}]"
    found = _known(Variant, given, where, "from")
    name = found.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{where}.name", name, "must be letters, digits, and any of . _ + -")
    where = f"variants.{name}"
    found["overrides"] = _overrides(found.get("overrides", {}), f"{where}.overrides")
    run = found.setdefault("run", "train")
    if run not in ("train", "evaluate"):
        raise ConfigError(f"{where}.run", run, "must be train or evaluate")
    if "budget" in found:
        if run != "train" or found.get("source") is None:
            remedy = "only a variant that trains from another's weights has its own"
            raise ConfigError(f"{where}.budget", found["budget"], remedy)
        found["budget"] = Budget(**_known(Budget, found["budget"], f"{where}.budget"))
    if run == "evaluate":
        found.setdefault("source", BASE)
    return Variant(**found)


def _check_sources(variants: tuple[Variant, ...]) -> None:
    by_name = {variant.name: variant for variant in variants}
    for variant in variants:
        key, seen, at = f"variants.{variant.name}.from", {variant.name}, variant
        while at.source is not None:
            if at.source not in by_name or by_name[at.source].run != "train":
                raise ConfigError(key, at.source, "must name a variant that is trained")
            if at.source in seen:
                raise ConfigError(key, variant.source, "goes round in a circle")
            seen.add(at.source)
            at = by_name[at.source]


def load_plan(
    path: str | Path, overrides: Mapping[str, Any] | None = None, out: str | None = None
) -> Plan:
    """Read a plan and refuse what is no plan; ``check`` looks at the configs themselves.

    Args:
        path: the YAML file.
        overrides: laid over the plan's own overrides of the base.
        out: in place of the plan's own folder.

    Raises:
        UserError: naming the key, its value and what would do.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("plan", str(path), f"cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError("plan", str(path), f"is no YAML: {error}") from error
    given = _known(Plan, content, "plan")
    if not isinstance(given.get("base"), str) or not Path(given["base"]).is_file():
        raise ConfigError("base", given.get("base"), "must be the path of a training config")
    listed = given.get("variants")
    if not isinstance(listed, list) or not listed:
        raise ConfigError("variants", listed, "must list at least one variant")
    variants = (Variant(BASE), *(_variant(one, number) for number, one in enumerate(listed)))
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            remedy = "is the plan's own" if name == BASE else "stands there twice"
            raise ConfigError("variants", name, remedy)
    _check_sources(variants)
    reference = given.get("reference", BASE)
    if reference not in names:
        raise ConfigError("reference", reference, "must name a variant")
    seeds = given.get("seeds", [0])
    plain = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
    if not plain or not seeds or len({*seeds}) < len(seeds):
        raise ConfigError("seeds", seeds, "must list different whole numbers from 0 up")
    if given.get("split", "test") not in ("test", "validation"):
        raise ConfigError("split", given["split"], "must be test or validation")
    own = _overrides(given.get("overrides", {}), "overrides")
    return Plan(
        base=given["base"],
        variants=variants,
        budget=Budget(**_known(Budget, given.get("budget", {}), "budget")),
        overrides={**own, **_overrides(overrides or {}, "overrides")},
        seeds=tuple(seeds),
        reference=reference,
        split=given.get("split", "test"),
        out=out or given.get("out") or f"runs/ablations/{Path(path).stem}",
    )
