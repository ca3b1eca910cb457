"""What a text source is: a stream of named documents and a fingerprint of their content."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ...errors import ConfigError

Wanted = Callable[[str], bool]
"""Tells by its name whether a document shall be read."""


class Document(NamedTuple):
    """One text, read in order from its first token to its last."""

    name: str
    text: str
    tokens: NDArray[Any] | None = None
    """(L,) token ids where another engine made them."""


class Entry(NamedTuple):
    """A document that is not read yet."""

    name: str
    read: Callable[[], str]


class Source(ABC):
    """Documents that are read one after the other, never all at once."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """Lines for the user about what was left out before anything was read."""
        self.made_by: str | None = None
        """The tokenizer that made the tokens of the documents; None where they are texts."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All documents in reading order; names may repeat and need not be UTF-8."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes whenever a document's name or content changes."""

    @abstractmethod
    def places(self) -> set[Hashable]:
        """What the documents are read from: one entry a file, however it is named."""

    @abstractmethod
    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read nothing from these places."""

    def lines(self) -> list[str]:
        """One line for each thing that was left out or mended while documents were read."""
        return []

    def report(self) -> list[str]:
        """All lines for the user."""
        return [*self.notes, *self.lines()]

    def names(self) -> Iterator[str]:
        """The names of all documents, in reading order: valid Unicode, none twice."""
        return (entry.name for entry in self._named())

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """The documents whose names are wanted, in reading order; the others are not read."""
        for entry in self._named():
            if wanted(entry.name):
                yield Document(entry.name, entry.read())

    def _named(self) -> Iterator[Entry]:
        unique = UniqueNames()
        for entry in self.entries():
            yield Entry(unique.take(readable(entry.name)), entry.read)


class UniqueNames:
    """Gives every document a name of its own: a name that is taken gets a number behind it."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def take(self, name: str) -> str:
        """The name, or the name with the first number that is free."""
        unique, count = name, self._counts.get(name, 1)
        while unique in self._taken:
            count += 1
            unique = f"{name} ({count})"
        if unique != name:
            self._counts[name] = count
        self._taken.add(unique)
        return unique


class Origin(NamedTuple):
    """The setting that a source came from, so that errors can name it."""

    key: str
    """Full name of the setting, e.g. ``data.source``."""
    value: str

    def error(self, remedy: str) -> ConfigError:
        """An error that names this setting, its value and the remedy."""
        return ConfigError(self.key, self.value, remedy)


def readable(name: str | os.PathLike[str]) -> str:
    """A name that can be written everywhere: bytes that are not UTF-8 become ``\\xe9`` and so on.

    The same on every machine, whatever its locale. Names that are UTF-8 stay as they are.
    """
    text = os.fspath(name)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A surrogate that stands for a byte of a file's name is that byte, any other is itself.
        raw = text.encode("utf-8", "surrogateescape" if _from_bytes(text) else "backslashreplace")
        return raw.decode("utf-8", "backslashreplace")
    return text


def _from_bytes(text: str) -> bool:
    return all("\udc80" <= char <= "\udcff" for char in text if "\ud800" <= char <= "\udfff")


def join_texts(texts: Sequence[str]) -> str:
    """Join texts, so that the next one begins on a line of its own."""
    if len(texts) == 1:
        return texts[0]
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts if text)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The error's type and the first line of its message, for messages of one line."""
    lines = readable(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__
