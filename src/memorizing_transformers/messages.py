"""Long messages of other libraries, made short."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import FrameType
from typing import Any

KEY = re.compile(r'Parser key "([\w.]+)":\s*')
UNION = re.compile(r"Errors:\n(.*?)\n\s*Given value type:.*?\n\s*Given value: (.*)", re.DOTALL)
EXPECTED = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])")
SUBCLASS = re.compile(r"Not a valid (subclass of \w+)")
GOT = re.compile(r"\. Got value: (.*)")
VAGUE = ("Expected ", "Not a valid subclass", "Import path", "Subclass types")
"""How reasons begin that only name other kinds of value."""
LONGEST_VALUE = 60


def one_line(message: str) -> str:
    """A message without its line breaks."""
    return re.sub(r"\s*\n\s*", " ", message).strip()


def _reasons(listed: str) -> list[str]:
    """The items of a list; nested items stay in their item."""
    indent = re.match(r"\s*", listed)
    assert indent is not None
    items = re.split(rf"(?:^|\n){indent[0]}- ", listed)
    return [one_line(item) for item in items if item.strip()]


def _must_be(reasons: list[str]) -> str:
    """One reason from several that each name a kind of value."""
    kinds = []
    for reason in reasons:
        if expected := EXPECTED.search(reason):
            kinds.append((expected[1] or expected[2]).replace("NoneType", "null"))
        elif subclass := SUBCLASS.search(reason):
            kinds.append(f"a {subclass[1]}")
        elif "import path" in reason:
            kinds.append("a class path")
    return f"must be {', '.join(dict.fromkeys(kinds))}" if kinds else reasons[0]


def shorten(message: str) -> str:
    """The parser's message in one line; for a value that fits no type, its key and the reason."""
    key, union, got = KEY.search(message), UNION.search(message), GOT.search(message)
    if union is not None:
        reasons, value = _reasons(union[1]), one_line(union[2])
        telling = [reason for reason in reasons if not reason.startswith(VAGUE)]
        reason = telling[0] if telling else _must_be(reasons)
    elif key is not None and got is not None:
        reason, value = _must_be([message[key.end() : got.start()]]), one_line(got[1])
    else:
        return one_line(KEY.sub(r"\1: ", message))
    if len(value) > LONGEST_VALUE:
        value = value[:LONGEST_VALUE] + "…"
    return f"{key[1]} = {value}: {reason}" if key is not None else reason


def setting_of(frames: Iterable[FrameType]) -> str:
    """The key that jsonargparse was reading, with the class given for it; "" if none is known.

    Args:
        frames: the innermost first.
    """
    kind: Any = None
    for frame in frames:
        if not str(frame.f_globals.get("__name__", "")).startswith("jsonargparse."):
            continue
        kind = kind or frame.f_locals.get("val_class")
        owner: Any = frame.f_locals.get("self")
        if type(owner).__name__ == "ActionTypeHint":
            name = f"{kind.__name__}: " if isinstance(kind, type) else ""
            return f"{owner.dest}: {name}"
    return ""
