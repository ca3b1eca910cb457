"""Tokens know their part of the text: the parts joined are the text, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import HOSTILE, word_tokenizer

from memorizing_transformers.data.tokens.tokenized_text import name_of_token, read_text, tokenize
from memorizing_transformers.data.tokens.tokenizers import (
    byte_tokenizer,
    encode_document,
    train_bpe,
)
from memorizing_transformers.errors import ConfigError

BPE = train_bpe(["def emoji():\n    return '😀 naïve'\n" * 9], 300)
TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": BPE}


class Slow:
    """A tokenizer that cannot tell where its tokens lie."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text.lower()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "text", [HOSTILE, "é", "a\r\nb", "😀😀", "   \n\n  x", "def f(): return '😀'"]
)
def test_pieces_joined_are_the_text(kind: str, text: str) -> None:
    tokens = tokenize(TOKENIZERS[kind], text)
    assert tokens.ids.tolist() == encode_document(TOKENIZERS[kind], text).tolist()
    assert "".join(tokens.pieces()) == text
    assert len(tokens.pieces()) == len(tokens)
    assert tokens.utf16_lengths().tolist() == [
        len(piece.encode("utf-16-le")) // 2 for piece in tokens.pieces()
    ]


def test_a_character_belongs_to_its_first_token() -> None:
    tokens = tokenize(TOKENIZERS["bytes"], "a😀b")
    assert tokens.pieces() == ["a", "😀", "", "", "", "b"]
    names = [name_of_token(TOKENIZERS["bytes"], int(token)) for token in tokens.ids]
    assert names == ["61", "F0", "9F", "98", "80", "62"]


def test_what_lies_between_tokens_belongs_to_the_next_one_and_the_rest_to_the_last() -> None:
    tokens = tokenize(word_tokenizer(["?", "a", "bc"]), "  a\tbc \n")
    assert tokens.pieces() == ["  a", "\tbc \n"]
    assert name_of_token(word_tokenizer(["?", "ab c"]), 1) == "ab c"


def test_a_tokenizer_without_places_gives_its_own_rendering() -> None:
    tokens = tokenize(Slow(), "AbC")
    assert (tokens.text, tokens.pieces()) == ("abc", ["a", "b", "c"])


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\0" + HOSTILE.encode())
    assert read_text(path) == "a\r\nb\0" + HOSTILE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9 au lait", r"is not UTF-8 \(byte 3"),
        (b"lone surrogate \xed\xa0\x80", r"is not UTF-8 \(byte 15"),
        (b"truncated \xf0\x9f\x98", "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"document = .*text'?: {reason}"):
        read_text(path)


def test_an_empty_text_has_no_tokens() -> None:
    tokens = tokenize(BPE, "")
    assert (len(tokens), tokens.pieces()) == (0, [])
    assert tokens.utf16_lengths().shape == (0,)
    assert tokens.ids.dtype == np.int64
