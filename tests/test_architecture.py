"""The rooms: which may import which, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memorizing_transformers

PACKAGE = "memorizing_transformers"
STUDIES = "memorizing_studies"
SOURCE = Path(memorizing_transformers.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 320

ROOMS = {
    "errors": set(),
    "registration": set(),
    "memory": {"errors"},
    "model": {"memory", "errors"},
    "data": {"errors", "pace", "parsing"},
    "pace": set(),
    "messages": set(),
    "failures": {"errors", "messages"},
    "repeated": set(),
    "parsing": {"failures", "messages", "repeated"},
    "pretrained": {"model", "memory", "data", "errors"},
    "generation": {"pretrained", "model", "memory", "data", "errors", "pace"},
    "training": {
        "generation",
        "pretrained",
        "model",
        "memory",
        "data",
        "errors",
        "failures",
        "pace",
        "parsing",
    },
    "commands": {"training", "generation", "pretrained", "model", "memory", "data", "errors"},
}
"""What each room may import of the package, besides itself."""

PLAIN_TORCH = {"memory": {"torch"}, "model": {"torch"}}
"""Rooms that know torch and the standard library, and nothing else."""

SEARCH_LIBRARIES = {"numpy", "faiss", "triton"}
"""What single search backends may need besides."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, by its absolute name."""
    package = [PACKAGE, *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield module


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def outsiders(path: Path) -> set[str]:
    """Top-level names of what a file imports from neither the package nor the standard library."""
    names = {module.partition(".")[0] for module in imports(path)}
    return names - sys.stdlib_module_names - {PACKAGE}


def insiders(path: Path) -> set[str]:
    """Rooms of the package that a file imports, its own left out."""
    inside = (module.split(".") for module in imports(path))
    return {names[1] for names in inside if names[0] == PACKAGE} - {room_of(path)}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in ROOMS], ids=name_of)
def test_rooms_import_only_what_lies_below(path: Path) -> None:
    assert insiders(path) <= ROOMS[room_of(path)]


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in PLAIN_TORCH], ids=name_of)
def test_memory_and_model_are_plain_torch(path: Path) -> None:
    allowed = PLAIN_TORCH[room_of(path)]
    if SOURCE / "memory" / "search" in path.parents:
        allowed = allowed | SEARCH_LIBRARIES
    assert outsiders(path) <= allowed


def test_every_file_has_a_room() -> None:
    """A new room belongs into the table above; only the package's own two files stand apart."""
    assert {room_of(path) for path in FILES} - ROOMS.keys() <= {"__init__", "__main__"}


def test_nobody_imports_the_studies() -> None:
    for path in FILES:
        assert STUDIES not in {module.partition(".")[0] for module in imports(path)}, path


@pytest.mark.parametrize(
    "path", [*FILES, *(SOURCE.parent / STUDIES).rglob("*.py")], ids=lambda path: path.name
)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST


def test_the_entry_point_is_short() -> None:
    assert len((SOURCE.parent.parent / "train.py").read_text().splitlines()) < 30


def test_imports_are_resolved_as_python_does() -> None:
    """The tests above see relative, absolute and nested imports alike."""
    found = set(imports(SOURCE / "memory" / "search" / "reference.py"))
    assert {"torch", f"{PACKAGE}.memory.view", f"{PACKAGE}.memory.search.protocol"} <= found
    nested = set(imports(SOURCE / "memory" / "search" / "__init__.py"))
    assert f"{PACKAGE}.memory.search.faiss_index" in nested
    assert "data" in insiders(SOURCE / "pretrained" / "hub.py")


def test_no_file_name_stands_for_two_ideas() -> None:
    names = [path.name for path in (*FILES, *(SOURCE.parent / STUDIES).rglob("*.py"))]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"__init__.py", "__main__.py", "commands.py"}


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them all as top-level modules, so the second one stops the whole run."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
