"""Count the lines of code of each room: no blank lines, comments, docstrings or imports.

make lines
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
"""Tokens that do not make a line a line of code."""


def code_lines(text: str) -> int:
    """Lines of code of a Python file.

    Every string that is a statement counts as a docstring, also below a constant or field.

    Args:
        text: the file.
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        docstring = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(lines)


def table(source: Path) -> str:
    """Files, lines and lines of code by package and room, as a table.

    A room is a folder of a package with all its subfolders; the package's own files are one room.

    Args:
        source: the folder of the packages.
    """
    rows = [f"{'':42} {'files':>6} {'lines':>7} {'code':>6}"]
    for package in sorted(path.parent for path in source.glob("*/__init__.py")):
        rooms: dict[str, Counter[str]] = {}
        for path in sorted(package.rglob("*.py")):
            inner = path.relative_to(package).parts
            text = path.read_text(encoding="utf-8")
            counted = Counter(files=1, lines=len(text.splitlines()), code=code_lines(text))
            for room in (package.name, f"  {inner[0]}/" if len(inner) > 1 else "  (top level)"):
                rooms.setdefault(room, Counter()).update(counted)
        rows += [
            f"{name:42} {n['files']:6,} {n['lines']:7,} {n['code']:6,}" for name, n in rooms.items()
        ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(SOURCE))
