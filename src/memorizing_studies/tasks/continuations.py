"""The tokens of candidates, as they would stand in the text after a place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from memorizing_transformers.data.tokens.encoding_rules import backend_of, text_only
from memorizing_transformers.data.tokens.tokenized_text import TokenizedText, tokenizing

from .items import Item

LEAD = 12
"""Tokens before a place that are encoded together with a candidate."""


def tokens_before(tokens: TokenizedText, place: int) -> int:
    """How many tokens end at or before a place in characters."""
    return int(np.searchsorted(tokens.ends, place, side="right"))


def tokens_up_to(tokens: TokenizedText, place: int) -> int:
    """How many tokens it takes to hold all characters before a place."""
    return int(np.searchsorted(tokens.ends, place, side="left")) + 1 if place else 0


def start_of(tokens: TokenizedText, index: int) -> int:
    """Where a token begins, in characters."""
    return int(tokens.ends[index - 1]) if index else 0


class Choice(NamedTuple):
    """A choice in tokens."""

    start: int
    """Tokens of the text that are read before."""
    candidates: list[list[int]]
    """The tokens of each candidate, those of text that is read for the item alone before them."""
    unscored: int = 0
    """Tokens at the start of each that are only such text."""


class Encoder:
    """Encodes texts and candidates with one tokenizer, as training does.

    Args:
        tokenizer: that of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.text: Callable[[str], TokenizedText] = tokenizing(tokenizer)
        """The tokens of a text."""
        backend = backend_of(tokenizer)
        self._backend = None if backend is None else text_only(backend)

    def short(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Of each short text its ids, and where they end in characters."""
        if self._backend is None:
            found = [self.text(text) for text in texts]
            return [(one.ids.tolist(), one.ends.tolist()) for one in found]
        encoded = self._backend.encode_batch([*texts], add_special_tokens=False)
        return [(one.ids, np.maximum.accumulate([end for _, end in one.offsets]).tolist())
                for one in encoded]  # fmt: skip

    def choice(self, tokens: TokenizedText, item: Item) -> Choice:
        """The tokens of an item's candidates.

        A token can hold the end of the text and the beginning of a candidate. So the candidates
        begin at the last end of a token before the place that all of them share. Text that is read
        for the item alone begins a token.

        Args:
            tokens: the text.
            item: a choice.
        """
        first = tokens_before(tokens, item.place)
        back = first if item.before else max(0, first - LEAD)
        begin = start_of(tokens, back)
        encoded = self._with_lead(tokens.text[begin : item.place], item)
        shared = set.intersection(*({begin + end for end in ends} for _, ends in encoded))
        for index in range(first, back, -1):
            seam = start_of(tokens, index)
            if seam in shared:
                return Choice(index, [_after(one, seam - begin) for one in encoded])
        rest = tokens.text[start_of(tokens, first) : item.place]
        encoded = self._with_lead(rest, item)
        end = len(rest + item.before) if item.before else 0
        unscored = min(int(np.searchsorted(ends, end, side="right")) for _, ends in encoded)
        return Choice(first, [ids for ids, _ in encoded], unscored)

    def _with_lead(self, lead: str, item: Item) -> list[tuple[list[int], list[int]]]:
        return self.short([f"{lead}{item.before}{c}{item.after}" for c in item.candidates])


def _after(encoded: tuple[list[int], list[int]], place: int) -> list[int]:
    ids, ends = encoded
    return ids[int(np.searchsorted(ends, place, side="right")) :]
