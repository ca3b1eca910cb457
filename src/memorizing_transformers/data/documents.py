"""What a text source is: a stream of named documents and a fingerprint of their content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from ..errors import ConfigError

Wanted = Callable[[str], bool]
"""Tells by its name whether a document shall be read."""


class Document(NamedTuple):
    """One text, read in order from its first token to its last."""

    name: str
    text: str


class Source(Protocol):
    """Documents that are read one after the other, never all at once."""

    def names(self) -> Iterator[str]:
        """The names of all documents, in reading order."""

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """The documents whose names are wanted, in reading order."""

    def fingerprint(self) -> str:
        """A hash that changes whenever a document's name or content changes."""

    def report(self) -> list[str]:
        """One line for each thing that the reader left out or mended."""


class Origin(NamedTuple):
    """The setting that a source came from, so that errors can name it."""

    key: str
    """Full name of the setting, e.g. ``data.source``."""
    value: str

    def error(self, remedy: str) -> ConfigError:
        """An error that names this setting, its value and the remedy."""
        return ConfigError(self.key, self.value, remedy)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The error's type and the first line of its message, for messages of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__
