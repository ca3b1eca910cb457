"""The documents that items are made of: those that are long enough and not hostile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Origin, UniqueNames, readable
from memorizing_transformers.data.sources.files import find_files
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.sources.text_files import TextFiles, TextGroup
from memorizing_transformers.data.sources.token_files import token_files
from memorizing_transformers.data.tokens.tokenized_text import TokenizedText, tokenizing
from memorizing_transformers.errors import ConfigError

from .items import Piece, digest_of

LONGEST_LINE = 100_000
"""Characters of a line; a document with a longer one is skipped."""
CHARACTERS_PER_TOKEN = 16
"""So many characters of a document are looked at for each token that is wanted."""
NO_PLACES = "the tokenizer cannot tell where its tokens lie"
"""The reason why a text is skipped of which a tokenizer gives a rendering."""


_tokenizing = lru_cache(maxsize=4)(tokenizing)
"""What all texts of a tokenizer need takes longer to make than to use."""


@dataclass
class Text:
    """A document, cut to the tokens that are looked at."""

    name: str
    text: str
    tokenizer: Any
    most: int
    """Tokens, at most."""

    @cached_property
    def tokens(self) -> TokenizedText:
        """Its tokens."""
        whole = _tokenizing(self.tokenizer)(self.text)
        if len(whole) <= self.most:
            return whole
        end = int(whole.ends[self.most - 1])
        count = int(np.searchsorted(whole.ends, end, side="right"))
        return TokenizedText(whole.text[:end], whole.ids[:count], whole.ends[:count])

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of it."""
        return (Piece(self.name, 0, len(self.tokens.text)),)

    def part(self, first: int, last: int) -> Piece:
        """The part from token ``first`` to the one before token ``last``."""
        ends = self.tokens.ends
        begin = int(ends[first - 1]) if first else 0
        return Piece(self.name, begin, int(ends[last - 1]))


@dataclass
class Texts:
    """The documents of a run."""

    texts: list[Text]
    skipped: Counter[str] = field(default_factory=Counter)
    """How many documents were skipped, by the reason."""
    background: list[NDArray[np.uint64]] = field(default_factory=list)
    """Hashes of other texts, of ``far_copies.hashes``: what is found there is boilerplate."""
    reference: Any = None
    """The arm of the model that key tokens are found with, or None."""
    notes: list[str] = field(default_factory=list)
    """Lines of the sources about what they left out."""

    def digests(self) -> dict[str, str]:
        """By name, a digest of each document."""
        return {text.name: digest_of(text.text) for text in self.texts}

    def join(self, pieces: Sequence[Piece]) -> str:
        """The text of pieces.

        Raises:
            KeyError: where a document is not there.
        """
        known = {text.name: text.text for text in self.texts}
        parts = [known[p.document][p.begin : p.end] if p.document else p.text for p in pieces]
        return "".join(parts)


def fault_of(text: str) -> str | None:
    """Why a text cannot be used, however long it is; None where it can."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary"
    longest, begin = 0, 0
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        longest, begin = max(longest, end - begin), end + 1
    if longest > LONGEST_LINE:
        return f"a line of more than {LONGEST_LINE:,} characters"
    return None


def open_texts(
    files: Sequence[str],
    tokenizer: Any,
    most_tokens: int,
    least_tokens: int,
    most_documents: int,
    text_column: str = "text",
    key: str = "data",
) -> Texts:
    """The documents of files.

    Args:
        files: text files, folders, globs, or records as JSON lines or Parquet.
        tokenizer: that of the model.
        most_tokens: tokens of a document that are looked at.
        least_tokens: tokens that a document must have.
        most_documents: documents; those after them are not read.
        text_column: column of records that holds the text.
        key: option to name in errors.

    Raises:
        ConfigError: where a file cannot be read.
    """
    found, seen = Texts([]), set[str]()
    with closing(_documents(files, text_column, key, found)) as documents:
        for name, text in documents:
            if len(found.texts) == most_documents:
                note = f"documents after the first {most_documents:,} usable ones were not read"
                found.notes.append(note)
                break
            one = Text(name, text[: most_tokens * CHARACTERS_PER_TOKEN], tokenizer, most_tokens)
            digest = digest_of(one.text)
            # The whole text, since a longest line may lie behind what is looked at.
            fault = fault_of(text) or _fault_of_part(one, least_tokens)
            if fault is None and digest in seen:
                fault = "a copy of another document"
            if fault is None:
                found.texts.append(one)
                seen.add(digest)
            else:
                found.skipped[fault] += 1
    return found


def _fault_of_part(one: Text, least_tokens: int) -> str | None:
    """Why what is looked at of a text cannot be used; None where it can."""
    if len(one.tokens) < least_tokens:
        return "too short"
    # Places in a rendering would be other places in the text.
    if not one.text.startswith(one.tokens.text):
        return NO_PLACES
    return None


def find_texts(
    files: Sequence[str],
    tokenizer: Any,
    most_tokens: int,
    names: Collection[str],
    text_column: str = "text",
    key: str = "data",
) -> Texts:
    """The documents of these names that files hold; whatever their lengths.

    Args:
        files: as for ``open_texts``, and in the same order.
        tokenizer: that of the model, which need not be the one that items were made with.
        most_tokens: as items were made with, since documents are cut by it.
        names: which ones; those after the last of them are not read.
        text_column: column of records that holds the text.
        key: option to name in errors.

    Raises:
        ConfigError: where a file cannot be read.
    """
    found = Texts([])
    with closing(_documents(files, text_column, key, found)) as documents:
        for name, text in documents:
            if name in names:
                cut = text[: most_tokens * CHARACTERS_PER_TOKEN]
                found.texts.append(Text(name, cut, tokenizer, most_tokens))
            if len(found.texts) == len(names):
                break
    return found


def _documents(
    files: Sequence[str], text_column: str, key: str, found: Texts
) -> Generator[tuple[str, str], None, None]:
    """The name and the text of each document; no two names are the same.

    Args:
        files: as for ``open_texts``.
        text_column: likewise.
        key: likewise.
        found: gets the lines of the sources, and the number of binary files.
    """
    try:
        rules = RecordRules(text_column)
    except ConfigError as error:
        raise ConfigError("text_column", text_column, _words(error)) from error
    names = UniqueNames()
    for file in files:
        origin = Origin(key, file)
        try:
            try:
                source = open_files(origin, rules, "file")
            except ConfigError:
                if not (binary := _only_binary(origin)):
                    raise
                found.skipped["binary"] += binary
                continue
            if source.made_by is not None:
                raise ConfigError(key, file, "holds tokens and no text; give texts")
            try:
                for name, text, _ in source.documents(lambda _: True):
                    yield names.take(name), text
            finally:
                found.notes += source.report()
        except ConfigError as error:
            raise ConfigError(key, file, _words(error)) from error


def _only_binary(origin: Origin) -> int:
    """How many binary files are in a place where no other file is, else 0."""
    files = find_files(origin).files
    if token_files(files):
        return 0
    texts = TextFiles([TextGroup(file.name, [file.path]) for file in files], origin)
    return 0 if texts.groups else texts.binary


def _words(error: ConfigError) -> str:
    """The remedy of an error of the data room, with the options and sources of this command."""
    words = readable(str(error).removeprefix(f"{error.key} = {error.value!r}: "))
    words = words.replace("data.text_column", "text_column")
    return words.replace("'stdlib', a file, a folder, a glob or hub:owner/name",
                         "a file, a folder or a glob")  # fmt: skip
