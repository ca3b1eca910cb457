"""The embedded corpus: the running interpreter's own standard library.

Every top-level package or module is one document, its ``*.py`` files joined in path order. Real
code, always there, nothing to download. Left out are installed packages, tests (folders ``test``,
``tests`` and ``idle_test``, which are huge and which some distributions lack), files made for one
build or one site and, by `CorpusSettings.shortest`, documents of less than 2,000 characters.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .documents import Origin
from .text_files import TextFiles, TextGroup

LEFT_OUT = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
OF_ONE_BUILD = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")

VALIDATION = (
    "argparse",
    "configparser",
    "difflib",
    "inspect",
    "ipaddress",
    "pickle",
    "shutil",
    "statistics",
    "subprocess",
)
TEST = (
    "dataclasses",
    "doctest",
    "imaplib",
    "json",
    "mailbox",
    "optparse",
    "tarfile",
    "threading",
    "typing",
)
"""Packages held out, all of them in Python 3.10 to 3.13: 6 % of the characters for each split,
43,000 to 133,000 in a package. A list of names, so that no Python version moves one of them."""


def standard_library(origin: Origin, root: Path | None = None) -> TextFiles:
    """The standard library's packages and modules as documents.

    Args:
        origin: the setting to name in errors.
        root: the library's folder. Default: that of the running interpreter.

    Raises:
        ConfigError: the folder holds no Python source, as in a frozen interpreter.
    """
    root = root or _root()
    source = TextFiles(list(_groups(root)), origin)
    if not source.groups:
        raise origin.error(f"no Python source in {root}; give a file, a folder or hub:owner/name")
    return source


def library_files() -> list[Path]:
    """The files of the running interpreter's standard library, in path order."""
    return [file for group in _groups(_root()) for file in group.files]


def held_out_split(name: str) -> str:
    """The split that a package belongs to."""
    if name in VALIDATION:
        return "validation"
    return "test" if name in TEST else "train"


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _groups(root: Path) -> Iterator[TextGroup]:
    entries = sorted(root.iterdir()) if root.is_dir() else []
    for entry in entries:
        if entry.name in LEFT_OUT or entry.name.startswith(OF_ONE_BUILD):
            continue
        if entry.is_dir():
            files = sorted(
                file
                for file in entry.rglob("*.py")
                if file.is_file() and LEFT_OUT.isdisjoint(file.relative_to(root).parts)
            )
            if files:
                yield TextGroup(entry.name, files)
        elif entry.suffix == ".py":
            yield TextGroup(entry.stem, [entry])
