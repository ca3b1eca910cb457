"""The scripts that write and count: configs/all-keys.yaml and the lines of each room."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


all_keys, lines = load("all_keys"), load("lines")

CODE = """\
total = 1
text = (
    "two",

    # a comment
    "three lines"  # of code
)
if total: total += 2
"""
REST = '''\
"""A docstring
of two lines."""

import os, sys
from pathlib import (
    Path,
)

# A comment.


class Empty:
    """One line."""

    field: int = 3
    """Of the field."""

    def method(self):
        """Another."""
        import json
        return """a string
        of code"""
'''
CODE_OF_REST = ["class", "field", "def", "return and the second line of its string"]


def test_all_keys_are_as_the_parser_has_them_now() -> None:
    assert all_keys.PATH.read_text(encoding="utf-8") == all_keys.document(), "run `make all-keys`"


def test_keys_are_in_their_groups_below_their_help() -> None:
    tree = {"a": {"b": 1, "c": {"d": None, "e": {"free": [1]}}, "theirs": 2}, "f": "x: y"}
    helps = {"a": "", "a.b": "word " * 30, "a.c.d": "", "a.c.e": "A value.\nTwo lines.", "f": "F."}
    shown = "\n".join(all_keys.entries(tree, helps))
    del tree["a"]["theirs"]  # type: ignore[attr-defined]
    assert yaml.safe_load(shown) == tree
    assert "    # A value. Two lines.\n    e:" in shown
    assert shown.count("word") == 30
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("\n\n# a\n", 0), (CODE, 6), (REST, len(CODE_OF_REST) + 1), (CODE + REST, 11)],
)
def test_lines_of_code_are_counted(text: str, count: int) -> None:
    assert lines.code_lines(text) == count


def test_rooms_are_summed_by_package(tmp_path: Path) -> None:
    for name in ("one/__init__.py", "one/a/x.py", "one/a/deeper/y.py", "two/__init__.py", "z.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CODE)
    found = [
        line.replace("(top level)", "top").split() for line in lines.table(tmp_path).split("\n")
    ]
    size = len(CODE.splitlines())
    assert found == [
        ["files", "lines", "code"],
        ["one", "3", str(3 * size), "18"],
        ["top", "1", str(size), "6"],
        ["a/", "2", str(2 * size), "12"],
        ["two", "1", str(size), "6"],
        ["top", "1", str(size), "6"],
    ]
