"""The copy-distance curve: tokens that a far copy predicts, and no near one.

Shapes: L tokens, n tokens of a match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from .continuations import start_of
from .items import Item, Sheet
from .task import Settings, Task, drawn_evenly
from .texts import Text, Texts

LEAST = 8
"""Tokens of the shortest match."""
LONGEST = 32
"""Longer matches count alike."""
LENGTHS = (8, 16, 32)
"""Lower edges of the ranges of match lengths."""
LOOKED_AT = 8
"""Occurrences of the last tokens that are looked at, the latest ones."""
PER_QUESTION = 10
"""Tokens that are scored for each question of other tasks: a token costs far less."""


@dataclass(frozen=True)
class Copy:
    """A token whose last tokens occurred before, far back."""

    text: Text
    index: int
    """Of the token."""
    distance: int
    """Tokens since the latest occurrence of the last ``LEAST`` tokens, to the token after it."""
    length: int
    """Tokens of the longest match."""
    right: bool
    """Whether the token after the longest match is the token."""
    own: bool
    """Whether no other document holds the match and its token."""


def copies(ids: Sequence[int], near: int) -> Iterable[tuple[int, int, int, bool]]:
    """Index, distance, length and rightness of all tokens with a far match and no near one.

    Args:
        ids: tokens of a document.
        near: tokens; a match that is not farther away is near.
    """
    latest: dict[tuple[int, ...], int] = {}
    before: dict[int, int] = {}
    for index in range(LEAST, len(ids)):
        gram = tuple(ids[index - LEAST : index])
        place = latest.get(gram)
        if place is not None:
            before[index] = place
            if index - place > near:
                longest, source, at = 0, place, place
                for _ in range(LOOKED_AT):
                    length = LEAST
                    while (
                        length < min(LONGEST, at)
                        and ids[at - 1 - length] == ids[index - 1 - length]
                    ):
                        length += 1
                    if length > longest:
                        longest, source = length, at
                    if at not in before:
                        break
                    at = before[at]
                yield index, index - place, longest, ids[source] == ids[index]
        latest[gram] = index


def hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(L - LEAST,) of each ``LEAST`` tokens and the one after them, a hash."""
    whole = ids.astype(np.uint64)
    count = max(0, len(ids) - LEAST)
    found = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(LEAST + 1):
            found = (found ^ whole[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
    return found


class FarCopies(Task):
    """How much of what is there to copy does the model take?"""

    name = "far-copies"
    title = "Copy-distance curve"
    axis = "tokens since the text was there before"
    shows = (
        "Tokens after at least 8 tokens that occurred before, and not lately. The suffix matcher "
        "takes the token that followed the longest match; it is what can be copied."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Tokens at all distances, from all documents."""
        own = [hashes(text.tokens.ids) for text in texts.texts]
        found: list[Copy] = []
        for number, text in enumerate(texts.texts):
            others = [one for n, one in enumerate([*own, *texts.background]) if n != number]
            seen = np.isin(own[number], np.concatenate([*others, np.zeros(0, np.uint64)]))
            ids = text.tokens.ids.tolist()
            far = [
                Copy(text, index, distance, length, right, not seen[index - LEAST])
                for index, distance, length, right in copies(ids, settings.min_distance - 1)
            ]
            skipped["nothing comes back from far enough"] += not far
            found += far
        most = PER_QUESTION * settings.questions
        kept = drawn_evenly(found, lambda copy: self._cell(copy, settings), most, random)
        items: dict[str, list[Item]] = {}
        guesses = {text.name: _guess(text.tokens.ids) for text in texts.texts}
        for copy in kept:
            x, group = self._cell(copy, settings)
            tokens = copy.text.tokens
            item = Item(
                place=start_of(tokens, copy.index),
                end=start_of(tokens, copy.index + 1),
                x=x,
                distance=copy.distance,
                chance=guesses[copy.text.name],
                group=group,
                rivals={"suffix matcher": float(copy.right)},
            )
            if item.end > item.place:  # else a part of a character
                items.setdefault(copy.text.name, []).append(item)
        pieces = {text.name: text.pieces for text in texts.texts}
        return [Sheet(pieces[name], tuple(own)) for name, own in items.items()]

    @staticmethod
    def _cell(copy: Copy, settings: Settings) -> tuple[int, str]:
        edge = max(length for length in LENGTHS if length <= copy.length)
        return settings.edge(copy.distance), group_of(edge, copy.own)


def group_of(edge: int, own: bool) -> str:
    """The name of a group: whose copies, and how long the match is."""
    above = [length for length in LENGTHS if length > edge]
    lengths = f"{edge}-{above[0] - 1}" if above else f"{edge} and more"
    whose = "the document's own" if own else "found elsewhere too"
    return f"{whose}, match of {lengths}"


def _guess(ids: NDArray[np.int64]) -> float:
    """How often two tokens of a document, drawn at random, are the same."""
    _, counts = np.unique(ids, return_counts=True)
    return float(((counts / counts.sum()) ** 2).sum())
