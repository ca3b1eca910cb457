"""Reads a plan of ablations from its YAML file and checks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.repeated import RepeatedKey, refuse_repeated_keys

from .plan import BASE, Budget, Plan, Variant

OWNED = {
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "trainer.max_steps": "budget",
    "trainer.max_time": "budget",
    "trainer.max_epochs": "budget",
    "trainer.default_root_dir": "out",
    "trainer.logger": "out",
    "trainer.devices": "--jobs (each variant runs on one device)",
    "trainer.num_nodes": "--jobs (each variant runs on one device)",
    "trainer.strategy": "--jobs (each variant runs on one device)",
    "final_report": "split",
    "ckpt_path": "from",
    "config": "base",
    "print_config": "base",
}
"""Config keys that a plan sets by itself, and what to use instead."""

NAME = re.compile(r"\w[\w.+-]{0,99}")
LONGEST_NAME = 200
"""Bytes in UTF-8; file systems allow 255."""
TAKEN = ("tensorboard", "table.md", "table.csv", "trials.csv", "plot.png")
"""Names of other files in a plan's folder."""


def _read(path: str | Path, key: str) -> Any:
    """The content of a YAML file that the user names with ``key``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        refuse_repeated_keys(text)
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(key, str(path), "must be text in UTF-8") from error
    except RepeatedKey as error:
        raise ConfigError(key, str(path), str(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(key, str(path), f"is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(key, str(path), "is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(key, str(path), "must be the path of a file") from error


def _known(kind: type, given: Any, where: str, renamed: str = "") -> dict[str, Any]:
    """A mapping whose keys are fields of ``kind``.

    Args:
        kind: the dataclass.
        given: the mapping.
        where: its key in the plan, for errors.
        renamed: the key in the plan of the field ``source``.
    """
    if not isinstance(given, dict):
        raise ConfigError(where, given, "must be a mapping")
    names = [renamed if f.name == "source" and renamed else f.name for f in fields(kind)]
    for key in given:
        if key not in names:
            raise ConfigError(where, key, f"no such key; there is {', '.join(names)}")
    return {"source" if key == renamed else key: value for key, value in given.items()}


def _overrides(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ConfigError(where, given, "must map keys to values, as in {model.d_ff: 512}")
    try:
        pairs = list(_flat(given))
    except RecursionError as error:
        raise ConfigError(where, "...", "is nested too deeply") from error
    flat = dict(pairs)
    for key, value in pairs:
        if value is not flat[key]:
            raise ConfigError(where, value, f"{key} is given twice")
        if key in OWNED:
            remedy = f"is set by the plan; use {OWNED[key]}"
            raise ConfigError(f"{where}.{key}", value, remedy)
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            remedy = "must be text, a number, true, false, null, or lists of them; quotes make text"
            raise ConfigError(f"{where}.{key}", value, remedy) from error
    return flat


def _flat(given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; a mapping with ``class_path`` is one value."""
    for key, value in given.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _variant(given: Any, number: int) -> Variant:
    where = f"variants[{number}]"
    found = _known(Variant, given, where, "from")
    name = found.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        remedy = "may have letters, digits and . _ + - only; put numbers and booleans in quotes"
        raise ConfigError(f"{where}.name", name, remedy)
    if len(name.encode()) > LONGEST_NAME:
        remedy = f"must be at most {LONGEST_NAME} bytes, as it names a folder"
        raise ConfigError(f"{where}.name", name, remedy)
    if name.lower() in TAKEN:
        raise ConfigError(
            f"{where}.name", name, "is the name of a result file; choose another name"
        )
    where = f"variants.{name}"
    found["overrides"] = _overrides(found.get("overrides", {}), f"{where}.overrides")
    if not isinstance(found.get("source"), str | None):
        raise ConfigError(f"{where}.from", found["source"], "must be the name of a variant")
    run = found.setdefault("run", "train")
    if run not in ("train", "evaluate"):
        raise ConfigError(f"{where}.run", run, "must be train or evaluate")
    if "budget" in found:
        if run != "train" or found.get("source") is None:
            remedy = "only a variant with run=train and from may have its own budget"
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
                raise ConfigError(
                    key, variant.source, "is circular: the variant would start from its own weights"
                )
            seen.add(at.source)
            at = by_name[at.source]


def load_plan(path: str | Path, overrides: Any = None, out: str | None = None) -> Plan:
    """Read a plan and check its own keys; ``check`` checks the configs of its variants.

    Args:
        path: the YAML file.
        overrides: changes of the base, which replace those of the plan key by key.
        out: the folder to use instead of the plan's.

    Raises:
        UserError: naming the key, its value and what would do.
    """
    given = _known(Plan, _read(path, "plan"), "plan")
    if not isinstance(given.get("base"), str) or not Path(given["base"]).is_file():
        raise ConfigError("base", given.get("base"), "must be the path of a training config")
    if not isinstance(_read(given["base"], "base"), dict):
        raise ConfigError("base", given["base"], "must be a mapping of keys to values")
    listed = given.get("variants")
    if not isinstance(listed, list) or not listed:
        raise ConfigError("variants", listed, "must list at least one variant")
    variants = (Variant(BASE), *(_variant(one, number) for number, one in enumerate(listed)))
    names = [variant.name for variant in variants]
    # Some file systems ignore case.
    folders = [name.lower() for name in names]
    for name in names[1:]:
        if folders.count(name.lower()) > 1:
            remedy = "is the name of the base" if name.lower() == BASE else "is given twice"
            raise ConfigError("variants", name, remedy)
    _check_sources(variants)
    reference = given.get("reference", BASE)
    if reference not in names:
        raise ConfigError("reference", reference, "must name a variant")
    seeds = given.get("seeds", [0])
    plain = isinstance(seeds, list) and all(type(s) is int and 0 <= s < 2**32 for s in seeds)
    if not plain or not seeds or len({*seeds}) < len(seeds):
        raise ConfigError("seeds", seeds, "must list different integers from 0 to 4,294,967,295")
    if given.get("split", "test") not in ("test", "validation"):
        raise ConfigError("split", given["split"], "must be test or validation")
    out = out or given.get("out", f"runs/ablations/{Path(path).stem}")
    if not isinstance(out, str) or not out or "\0" in out:
        raise ConfigError("out", out, "must be the path of a folder")
    own = _overrides(given.get("overrides", {}), "overrides")
    return Plan(
        base=given["base"],
        variants=variants,
        budget=Budget(**_known(Budget, given.get("budget", {}), "budget")),
        overrides={**own, **_overrides({} if overrides is None else overrides, "overrides")},
        seeds=tuple(seeds),
        reference=reference,
        split=given.get("split", "test"),
        out=out,
    )
