"""Several documents in one memory: does what does not belong distract?"""

from __future__ import annotations

from collections import Counter
from random import Random

from .continuations import start_of
from .items import Item, Piece, Sheet
from .task import Settings, Task
from .texts import Texts

COUNTS = (1, 2, 4, 8)
"""Documents d in the memory."""
PART = 4
"""Tokens that are read of each document, as a multiple of the shortest distance."""


class ManyDocuments(Task):
    """The loss of a document's text after other documents were read."""

    name = "many-documents"
    title = "Several documents in one memory"
    axis = "documents in the memory"
    measure = "nats"
    shows = (
        "Parts of d - 1 other documents are read, then a part of one document, and then its next "
        "tokens are scored: the same tokens for each d. Only the other documents differ."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Parts of documents, each after 0, 1, 3 and 7 others."""
        part, scored = PART * settings.min_distance, settings.min_distance
        fit = [text for text in texts.texts if len(text.tokens) >= part + scored]
        if len(fit) < 2:
            skipped["fewer than 2 documents are long enough"] += 1
            return []
        sheets = []
        for _ in range(max(1, settings.questions // (2 * len(COUNTS)))):
            target, *_ = own = random.sample(fit, len(fit))
            # With few documents, other parts of the same ones follow.
            others: list[Piece] = []
            for number in range(max(COUNTS) - 1):
                other = own[1 + number % (len(own) - 1)]
                first = random.randrange(len(other.tokens) - part + 1)
                others.append(other.part(first, first + part))
            first = random.randrange(len(target.tokens) - part - scored + 1)
            begin, end = (start_of(target.tokens, first + n) for n in (0, part + scored))
            middle = start_of(target.tokens, first + part)
            for count in COUNTS:
                before = others[: count - 1]
                length = sum(piece.end - piece.begin for piece in before)
                item = Item(
                    place=length + middle - begin,
                    end=length + end - begin,
                    x=count,
                    distance=0,
                    chance=0.0,
                )
                sheets.append(Sheet((*before, Piece(target.name, begin, end)), (item,)))
        return sheets
