"""Tokens that another engine made: the texts behind them, and whether the tokenizer is that one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ..sources.documents import Document
from .tokenizers import BPE, BYTES, make_encoder, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHECKED = 1_000
GIVEN_UP = 10 * CHECKED
"""Tokens after which a tokenizer that changes texts is no longer tried."""
STRAY, FEW = 0.05, 4
"""The share of these tokens, and the number more, that may differ: texts that were joined as tokens
do so where they meet."""


class MadeElsewhere:
    """Gives documents of tokens their texts.

    Special tokens at both ends of a document are left out, since no store has any. The first
    `CHECKED` tokens are encoded again, as a check of the tokenizer.

    Args:
        tokenizer: None for one that would yet be trained.
        name: of the tokenizer, as the user gave it.
        made_by: what the files say of the tokenizer.

    Raises:
        ConfigError: the tokenizer cannot be the one that made the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, name: str, made_by: str) -> None:
        self.name = name
        self.made_by = made_by
        if tokenizer is None or name in (BPE, BYTES):
            raise self._other("made no such file")
        self.tokenizer = tokenizer
        self.size = vocabulary_size(tokenizer)
        self._encode = make_encoder(tokenizer)
        known = tokenizer.added_tokens_decoder.items()
        special = [index for index, token in known if token.special]
        self._special = np.asarray(special, np.int64)
        # An unknown character at an end is text.
        ends = [index for index in special if index != tokenizer.unk_token_id]
        self._at_ends = np.asarray(ends, np.int64)
        self._checked = self._alike = self._unsaid = 0

    def with_texts(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, each with the text that its tokens stand for.

        Raises:
            ConfigError: a token is not in the vocabulary, or the check fails.
        """
        for document in documents:
            assert document.tokens is not None
            tokens = self._without_ends(document.tokens.astype(np.uint32))
            if len(tokens) and int(tokens.max()) >= self.size:
                raise self._other(
                    f"has {self.size:,} tokens, and {document.name!r} holds token "
                    f"{int(tokens.max()):,}"
                )
            if self._checked < CHECKED and self._unsaid < GIVEN_UP:
                self._check(tokens)
            yield Document(document.name, self._decode(tokens), tokens)
        self._judge()
        if self._unsaid > self._checked:
            log.warning(
                "data.tokenizer = %r changes texts, so nobody can tell whether it made the tokens "
                "of the source (%s)",
                self.name,
                self.made_by,
            )

    def _without_ends(self, tokens: NDArray[Any]) -> NDArray[Any]:
        inner = np.flatnonzero(~np.isin(tokens, self._at_ends))
        return tokens[inner[0] : inner[-1] + 1] if len(inner) else tokens[:0]

    def _decode(self, tokens: NDArray[Any]) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    def _check(self, tokens: NDArray[Any]) -> None:
        """Count tokens, and those that encoding their text gives too, between special tokens."""
        at = np.flatnonzero(np.isin(tokens, self._special))
        for start, stop in pairwise([-1, *at.tolist(), len(tokens)]):
            part = tokens[start + 1 : stop][:GIVEN_UP]
            text = self._decode(part)
            again = self._encode(text)
            if not np.array_equal(again, part) and self._decode(again).strip() != text.strip():
                self._unsaid += len(part)  # a tokenizer that changes texts says nothing
                continue
            self._checked += len(part)
            self._alike += (Counter(again.tolist()) & Counter(part.tolist())).total()
        if self._checked >= CHECKED:
            self._judge()

    def _judge(self) -> None:
        if self._checked - self._alike > STRAY * self._checked + FEW:
            raise self._other(
                f"gives {self._alike / self._checked:.0%} of the tokens that were checked"
            )

    def _other(self, what: str) -> ConfigError:
        return ConfigError(
            "data.tokenizer",
            self.name,
            f"{what}; give the folder or the name on the hub of the tokenizer that made the tokens "
            f"of the source ({self.made_by})",
        )
