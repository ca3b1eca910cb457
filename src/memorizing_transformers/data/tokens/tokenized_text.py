"""A document as tokens that know which part of its text each one stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ..sources.documents import first_line
from .encoding_rules import backend_of, text_only
from .tokenizers import byte_vocabulary, make_encoder


@dataclass(frozen=True)
class TokenizedText:
    """A text cut where its tokens end, so that the pieces joined are the text.

    A character that a byte-level tokenizer spread over several tokens belongs to the first of them;
    the others stand for the empty string.
    """

    text: str
    ids: NDArray[np.int64]
    """(L,) token ids."""
    ends: NDArray[np.int64]
    """(L,) ascending, where in the text each token ends, in characters; the last is its length."""

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self) -> list[str]:
        """The text of every token."""
        ends = self.ends.tolist()
        return [self.text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def utf16_lengths(self) -> NDArray[np.int64]:
        """(L,) the length of every token's text in UTF-16 units, by which browsers count."""
        points = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        units = np.concatenate([[0], np.cumsum(1 + (points > 0xFFFF))])
        return np.diff(units[self.ends], prepend=0)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they stand, without a byte order mark.

    Raises:
        ConfigError: where it cannot be read, is empty, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "document", str(path), f"cannot be read ({first_line(error)}); give a text file"
        ) from error
    return text_of(raw, str(path))


def text_of(raw: bytes, name: str) -> str:
    """The text of UTF-8 bytes, its line ends as they stand, without a byte order mark.

    Args:
        raw: the bytes.
        name: of the document, for errors.

    Raises:
        ConfigError: where they are empty or not UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = f"is not UTF-8 (byte {error.start}: {error.reason}); convert it first"
        raise ConfigError("document", name, remedy) from error
    if not text:
        raise ConfigError("document", name, "is empty; give a file that holds text")
    return text


def tokenizing(tokenizer: Any) -> Callable[[str], TokenizedText]:
    """From a text to the ids that training would give it, each with its part of it.

    A tokenizer that cannot tell where its tokens lie gives back its own rendering of the text. For
    several texts: what all of them need takes longer to make than to use.
    """
    encode, backend = make_encoder(tokenizer), backend_of(tokenizer)
    copy = None if backend is None else text_only(backend)

    def tokenized(text: str) -> TokenizedText:
        ids = encode(text).astype(np.int64)
        raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        if np.array_equal(ids, raw):
            # One token a byte: every byte that continues no character begins one.
            return TokenizedText(text, ids, np.cumsum((raw & 0xC0) != 0x80))
        if copy is None:
            rendered = {token: tokenizer.decode([token]) for token in np.unique(ids).tolist()}
            pieces = [rendered[token] for token in ids.tolist()]
            return TokenizedText("".join(pieces), ids, np.cumsum([len(piece) for piece in pieces]))
        offsets = copy.encode(text, add_special_tokens=False).offsets
        ends = np.asarray([end for _, end in offsets], dtype=np.int64)
        ends = np.maximum.accumulate(ends)
        if len(ends):
            ends[-1] = len(text)
        return TokenizedText(text, ids, ends)

    return tokenized


def tokenize(tokenizer: Any, text: str) -> TokenizedText:
    """One text as `tokenizing` gives it."""
    return tokenizing(tokenizer)(text)


def name_of_token(tokenizer: Any, token: int) -> str:
    """What to call a token that stands for no text of its own: its bytes in hexadecimal digits, or
    the vocabulary's name for it."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    known = byte_vocabulary()
    if name and all(char in known for char in name):
        return " ".join(f"{known[char]:02X}" for char in name)
    return name
