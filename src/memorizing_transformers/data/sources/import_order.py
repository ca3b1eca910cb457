"""The order of Isabelle theories: each after the theories of its folder that it imports."""

from __future__ import annotations

import heapq
import posixpath
import re
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from itertools import islice
from pathlib import PurePosixPath

SUFFIX = ".thy"
HEADER_CHARACTERS = 1 << 14
"""No header is longer, comments in it included."""
ASIDE = re.compile(
    r"\(\*(?:(?!\(\*|\*\)).)*\*\)"
    r"|\\<open>(?:(?!\\<open>|\\<close>).)*\\<close>|\u2039[^\u2039\u203a]*\u203a"
    r"|\{\*(?:(?!\{\*|\*\}).)*\*\}",
    re.DOTALL,
)
"""A comment or a piece of prose with no other in it."""
ASIDE_BEGINS = re.compile(r"\(\*|\\<open>|\u2039|\{\*")
BEGINS = re.compile(r"(?:^|\*\)|\\<close>)\s*(theory)\s", re.MULTILINE)
MOST_BEGINS = 100
"""Of these, most are in comments; each takes a reading of what is before it."""
HEADER = re.compile(
    r"""theory\s+(?:%\S+\s+)?(?:"[^"]*"|[\w.']+)\s+imports\b(.*?)\s(?:keywords|abbrevs|begin)\b""",
    re.DOTALL,
)
LIBRARY = re.compile(r"((?:HOL|Pure|ZF|FOL|CTT|LCF|Sequents)(?:-\w+)*)\.")
"""Isabelle's own sessions before a theory's name."""
NAME = re.compile(r'"([^"]*)"|([^\s"]+)')


def in_import_order(names: Sequence[str], read: Callable[[str], str]) -> list[str]:
    """Order the files of a folder; what no import orders stays in the given order.

    Args:
        names: paths of the files with forward slashes. Files of other kinds import nothing.
        read: from a name to the text of the file.

    Raises:
        CycleError: theories import each other; its second argument is the list of them.
    """
    theories = [name for name in names if name.endswith(SUFFIX)]
    sorter: TopologicalSorter[str] = TopologicalSorter({name: () for name in names})
    for name in theories:
        found = [_find(imported, name, theories) for imported in imports_of(read(name))]
        sorter.add(name, *(other for other in found if other not in (None, name)))
    sorter.prepare()
    number = {name: index for index, name in enumerate(names)}
    ready: list[int] = []
    order: list[str] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, number[name])
        order.append(names[heapq.heappop(ready)])
        sorter.done(order[-1])
    return order


def imports_of(text: str) -> list[str]:
    """The imports of a theory as its header names them, without quotes."""
    for begin in islice(BEGINS.finditer(text), MOST_BEGINS):
        start = begin.start(1)
        if not ASIDE_BEGINS.search(_without_asides(text[:start])):
            rest = _without_asides(text[start : start + HEADER_CHARACTERS])
            header = HEADER.match(rest)
            return [quoted or name for quoted, name in NAME.findall(header[1])] if header else []
    return []


def _without_asides(text: str) -> str:
    left = 1
    while left:
        text, left = ASIDE.subn(" ", text)
    return text


def _find(imported: str, importer: str, theories: Sequence[str]) -> str | None:
    """The theory of the same folder that an import means, None if it is elsewhere.

    A path is relative to the theory that imports. Of a name such as ``Session.Theory`` the last
    part counts; if several theories have it, the one nearest to the importer does. A theory of
    Isabelle's own library is elsewhere, unless the importer is in a folder of that session.
    """
    library = LIBRARY.match(imported)
    if library:
        session = library[1]
        if not {session, session.rpartition("-")[2]} & {*PurePosixPath(importer).parts[:-1]}:
            return None
    folder = posixpath.dirname(importer)
    exact = posixpath.normpath(posixpath.join(folder, imported)) + SUFFIX
    if exact in theories:
        return exact
    stem = posixpath.basename(imported).split(".")[-1]
    alike = [name for name in theories if PurePosixPath(name).stem == stem]
    return max(alike, key=lambda name: len(posixpath.commonpath([name, importer])), default=None)
