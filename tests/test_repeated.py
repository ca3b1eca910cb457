"""A key that a YAML or JSON file gives twice is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import yaml

from memorizing_transformers.repeated import RepeatedKey, refuse_repeated_keys


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", (1, 3)),
        ("a: {b: 1}\nc: 2\na: {d: 1}\n", "a", (1, 3)),
        ("a: 1\na: {b: 1}\n", "a", (1, 2)),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1\n", "a.b.c", (3, 5)),
        ("- {a: 1}\n- {a: 1,\n   a: 2}\n", "1.a", (2, 3)),
        ('{"a": {"b": 1,\n "b": 1}}', "a.b", (1, 2)),
        ('a: 1\n"a": 2\n', "a", (1, 2)),
        ("1: a\n'1': b\n", "1", (1, 2)),
        ("a.b: 1\na: {b: 2}\n", "a.b", (1, 2)),
        ("a: {b: {c: 1}}\na.b: {c: 2}\n", "a.b.c", (1, 2)),
        ("a: {b: 1}\na.b: 2\n", "a.b", (1, 2)),
        ("x: &x {a: 1, a: 2}\ny: *x\n", "x.a", (1, 1)),
    ],
)
def test_a_repeated_key_is_named_with_its_lines(
    text: str, key: str, lines: tuple[int, int]
) -> None:
    where = f"lines {lines[0]} and {lines[1]}" if lines[0] < lines[1] else f"line {lines[0]}"
    with pytest.raises(RepeatedKey, match=rf"^{key} is given twice, in {where};"):
        refuse_repeated_keys(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[1, 1, 1]",
        "a: {b: 1}\nc: {b: 1}\n",
        "[{a: 1}, {a: 1}]",
        "x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: *x\n",
        "x: &x {a: 1}\ny: {<<: *x, <<: *x}\n",
        "a.b: {c: 1}\na: {b: {d: 2}}\n",
        "x: &x [*x]",
    ],
)
def test_what_is_no_repetition_passes(text: str) -> None:
    refuse_repeated_keys(text)


def draw_mapping(draw: random.Random, depth: int) -> dict[str, Any]:
    keys = draw.sample("abcdefgh", draw.randint(1, 4))
    return {key: draw_mapping(draw, depth - 1) if depth and draw.random() < 0.6 else draw.random()
            for key in keys}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_drawn_mappings_pass_until_a_key_is_doubled(seed: int) -> None:
    draw = random.Random(seed)
    mapping = draw_mapping(draw, 3)
    for text in (json.dumps(mapping, indent=1), yaml.safe_dump(mapping, sort_keys=False)):
        refuse_repeated_keys(text)
    lines = yaml.safe_dump(mapping, sort_keys=False).splitlines()
    number = draw.choice([n for n, line in enumerate(lines) if not line.endswith(":")])
    doubled = [*lines[: number + 1], *lines[number:]]
    key = lines[number].split(":")[0].strip()
    said = rf"(^|\.){key} is given twice, in lines {number + 1} and {number + 2};"
    with pytest.raises(RepeatedKey, match=said):
        refuse_repeated_keys("\n".join(doubled))
