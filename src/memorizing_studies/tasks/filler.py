"""Real text that facts are written into, at places that are known in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from memorizing_transformers.data.tokens.tokenized_text import TokenizedText

from .continuations import Encoder, start_of, tokens_up_to
from .items import Piece
from .texts import Text, Texts

LEAD = 32
"""Tokens of real text before what is written first."""
SPARE = 8
"""Tokens more than needed at the end; where facts meet real text, tokens can change."""
TOO_SHORT = "no document is long enough"
"""The reason why a text is not made."""


@dataclass(frozen=True)
class Written:
    """A text with facts in it."""

    pieces: tuple[Piece, ...]
    tokens: TokenizedText
    begins: list[int]
    """Where each fact begins, in characters."""
    ends: list[int]

    def after(self, fact: int, distance: int) -> int | None:
        """The place so many tokens after the end of a fact; None where it is not in the text."""
        index = tokens_up_to(self.tokens, self.ends[fact]) + distance
        if index > len(self.tokens):
            return None
        place = start_of(self.tokens, index)
        # Otherwise the token ends within a character.
        return place if tokens_up_to(self.tokens, place) == index else None


class Filler:
    """Parts of documents, drawn at random.

    Args:
        texts: the documents; at least one.
        random: what draws.
    """

    def __init__(self, texts: Texts, random: Random) -> None:
        self.texts, self.random = texts, random
        self.encoder = Encoder(texts.texts[0].tokenizer)

    def draw(self, tokens: int) -> tuple[Text, int] | None:
        """A document and one of its tokens, near the begin of a line, with ``tokens`` tokens from
        there on; None where no document is as long."""
        fit = [text for text in self.texts.texts if len(text.tokens) >= tokens]
        if not fit:
            return None
        text = self.random.choice(fit)
        first = self.random.randrange(len(text.tokens) - tokens + 1)
        begin = text.tokens.text.rfind("\n", 0, start_of(text.tokens, first) + 1) + 1
        return text, tokens_up_to(text.tokens, begin)

    def write(self, text: Text, first: int, parts: Sequence[str | int]) -> Written:
        """Facts and real text in turns.

        Args:
            text: the document.
            first: its token that the text begins with.
            parts: facts, and how many tokens of the document stand between them.
        """
        pieces: list[Piece] = []
        begins, ends, length = [], [], 0
        for part in parts:
            if isinstance(part, int):
                last = min(len(text.tokens), first + part)
                piece = text.part(first, last)
                length += piece.end - piece.begin
                first = last
            else:
                piece = Piece(text=part)
                begins.append(length)
                length += len(part)
                ends.append(length)
            pieces.append(piece)
        tokens = self.encoder.text(self.texts.join(pieces))
        return Written(tuple(pieces), tokens, begins, ends)
