"""What a task asks: texts, and items at places in them. Saved as JSON, so that models see the same.

All places are in characters, so that models with different tokenizers can be asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from memorizing_transformers.data.sources.documents import first_line
from memorizing_transformers.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """A part of a text: a part of a document, or text of its own."""

    document: str = ""
    """Name of the document; empty for text of its own."""
    begin: int = 0
    """Place in the document where the part begins, in characters."""
    end: int = 0
    text: str = ""
    """The text, where there is no document."""


@dataclass(frozen=True)
class Item:
    """One thing that is scored: a choice between continuations, or the loss of a part of the text.

    It is a choice if it has candidates.
    """

    place: int
    """Characters of the text that are read before."""
    x: int
    """Place on the axis of the task, e.g. the lower edge of a range of distances."""
    distance: int
    """Tokens between the end of the last mention of what is asked for and the place."""
    chance: float
    """Accuracy of a guess."""
    group: str = ""
    """Items of different groups have results of their own."""
    end: int = 0
    """End of the part whose loss is taken, in characters; 0 for a choice."""
    candidates: tuple[str, ...] = ()
    answer: int = 0
    """Index of the right candidate."""
    before: str = ""
    """Text that is read before the candidates, for this item alone."""
    after: str = ""
    """Text that ends every candidate. So no candidate can be the beginning of another one."""
    rivals: Mapping[str, float] = field(default_factory=dict)
    """By the name of a simple rule, whether it is right: 1 or 0."""


@dataclass(frozen=True)
class Sheet:
    """A text that is read once, and its items."""

    pieces: tuple[Piece, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ItemSet:
    """The items of all tasks."""

    tasks: Mapping[str, Sequence[Sheet]]
    """By the name of the task."""
    skipped: Mapping[str, Mapping[str, int]]
    """By the name of the task (or ``documents`` for all): how many were skipped, by the reason."""
    settings: Mapping[str, Any]
    """What they were made with."""
    digests: Mapping[str, str]
    """By document, a digest of its text."""


def digest_of(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _short(record: Any) -> dict[str, Any]:
    """The fields of a record that are not as by default."""
    found = {}
    for one in fields(record):
        value = getattr(record, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value != default:
            found[one.name] = value
    return found


def save(items: ItemSet, path: Path) -> None:
    """Write items as JSON; the file is complete as soon as it is there."""
    tasks = {
        name: [
            {"pieces": [_short(p) for p in s.pieces], "items": [_short(i) for i in s.items]}
            for s in sheets
        ]
        for name, sheets in items.tasks.items()
    }
    whole = {"format": FORMAT, **vars(items), "tasks": tasks}
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(whole, ensure_ascii=False), "utf-8", "surrogatepass")
    draft.replace(path)


def load(path: Path) -> ItemSet:
    """Items that ``save`` wrote.

    Raises:
        ConfigError: where the file cannot be read or holds something else.
    """
    try:
        whole = json.loads(path.read_text("utf-8", "surrogatepass"))
        if whole["format"] != FORMAT:
            raise ValueError(f"format {whole['format']}, this version reads {FORMAT}")
        tasks = {name: [_sheet(s) for s in sheets] for name, sheets in whole["tasks"].items()}
        items = ItemSet(tasks, whole["skipped"], whole["settings"], whole["digests"])
        _check(items)
        return items
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"is no items.json of this command ({first_line(error)}); leave it out"
        raise ConfigError("items", str(path), remedy) from error


def _check(items: ItemSet) -> None:
    """Refuse what a hand put in the place of what ``save`` wrote.

    Raises:
        ValueError: saying what is wrong.
        AttributeError: where something else stands in the place of a dictionary.
    """
    for name, value in items.settings.items():
        if name != "tokenizer" and type(value) is not int:
            raise ValueError(f"settings: {name} is {value!r}, not a whole number")
    for reasons in items.skipped.values():
        if not all(type(count) is int for count in reasons.values()):
            raise ValueError("skipped: a count is not a whole number")
    known = items.digests.keys()
    for sheet in (sheet for sheets in items.tasks.values() for sheet in sheets):
        for piece in sheet.pieces:
            if piece.document and piece.document not in known:
                raise ValueError(f"digests: document {piece.document!r} has none")
        for item in sheet.items:
            if item.candidates and not 0 <= item.answer < len(item.candidates):
                raise ValueError(f"tasks: an item has no candidate {item.answer}")


def _sheet(record: dict[str, Any]) -> Sheet:
    items = [
        Item(**{**one, "candidates": tuple(one.get("candidates", ()))}) for one in record["items"]
    ]
    return Sheet(tuple(Piece(**piece) for piece in record["pieces"]), tuple(items))
