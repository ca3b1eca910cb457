"""Reading a plan of ablations from its file, and refusing what is none."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .plan import BASE, Budget, Plan, Variant

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
    "config": "base",
    "print_config": "base",
}
"""Keys of a config that a plan sets by itself, and what of the plan says so."""

NAME = re.compile(r"\w[\w.+-]{0,99}")
TAKEN = ("tensorboard", "table.md", "table.csv", "trials.csv", "plot.png")
"""What else stands in a plan's folder."""


class Strict(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As yaml's own, before mappings are merged into one another."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            reason = f"{twice} stands there twice"
            raise yaml.composer.ComposerError(None, None, reason, node.start_mark)
        return node


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
        raise ConfigError(where, given, "must map keys to values, as in {model.d_ff: 512}")
    flat = _flat(given)
    for key, value in flat.items():
        if key in OWNED:
            raise ConfigError(f"{where}.{key}", value, f"is the plan's own matter ({OWNED[key]})")
        try:
            json.dumps(value)
        except TypeError as error:
            remedy = "must be text, a number, true, false, null, or lists of them; quotes make text"
            raise ConfigError(f"{where}.{key}", value, remedy) from error
    return flat


def _flat(given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, also where mappings stand in one another; a class stays whole."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        nested = isinstance(value, dict) and value and "class_path" not in value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _variant(given: Any, number: int) -> Variant:
    where = f"variants[{number}]"
    found = _known(Variant, given, where, "from")
    name = found.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        remedy = "must be letters, digits and any of . _ + -, in quotes if YAML reads no text"
        raise ConfigError(f"{where}.name", name, remedy)
    if name.lower() in TAKEN:
        raise ConfigError(f"{where}.name", name, "is what a result of the plan is called")
    where = f"variants.{name}"
    found["overrides"] = _overrides(found.get("overrides", {}), f"{where}.overrides")
    if not isinstance(found.get("source"), str | None):
        raise ConfigError(f"{where}.from", found["source"], "must be the name of a variant")
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


def load_plan(path: str | Path, overrides: Any = None, out: str | None = None) -> Plan:
    """Read a plan and refuse what is no plan; ``check`` looks at the configs themselves.

    Args:
        path: the YAML file.
        overrides: a mapping that is laid over the plan's own overrides of the base.
        out: in place of the plan's own folder.

    Raises:
        UserError: naming the key, its value and what would do.
    """
    try:
        # Safe: the loader is yaml's own, made stricter.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Strict)
    except OSError as error:
        raise ConfigError("plan", str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("plan", str(path), "must be text in UTF-8") from error
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
    # Some file systems do not tell case apart.
    folders = [name.lower() for name in names]
    for name in names[1:]:
        if folders.count(name.lower()) > 1:
            remedy = "is the plan's own" if name.lower() == BASE else "stands there twice"
            raise ConfigError("variants", name, remedy)
    _check_sources(variants)
    reference = given.get("reference", BASE)
    if reference not in names:
        raise ConfigError("reference", reference, "must name a variant")
    seeds = given.get("seeds", [0])
    plain = isinstance(seeds, list) and all(type(s) is int and 0 <= s < 2**32 for s in seeds)
    if not plain or not seeds or len({*seeds}) < len(seeds):
        raise ConfigError("seeds", seeds, "must list different whole numbers, 0 to 4,294,967,295")
    if given.get("split", "test") not in ("test", "validation"):
        raise ConfigError("split", given["split"], "must be test or validation")
    out = out or given.get("out", f"runs/ablations/{Path(path).stem}")
    if not isinstance(out, str):
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
