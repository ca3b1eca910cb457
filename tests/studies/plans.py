"""A small plan and its results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

VARIANTS: list[dict[str, Any]] = [
    {"name": "no-memory", "overrides": {"model.memory.layers": []}},
    {"name": "larger", "overrides": {"model.memory.size": 64}, "run": "evaluate"},
    {"name": "broken", "overrides": {"data.tokenizer": "bpe"}, "run": "evaluate"},
    {
        "name": "retrofit",
        "overrides": {"model.memory.layers": [-1]},
        "from": "no-memory",
        "budget": {"tokens": 8 * 64},
    },
]


def write_plan(path: Path, base: Path, out: Path, /, **changes: Any) -> Path:
    plan = {
        "base": str(base),
        "budget": {"tokens": 24 * 64},
        "out": str(out),
        "variants": VARIANTS,
        **changes,
    }
    path.write_text(yaml.safe_dump(plan))
    return path


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = {path.parent.parent.name: path for path in sorted(out.glob("*/*/result.json"))}
    return {name: json.loads(path.read_text()) for name, path in found.items()}


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["variant"]: row for row in csv.DictReader(file)}
