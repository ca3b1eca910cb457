"""Tokenizers: bytes, a byte-level BPE trained on the corpus, or any of `transformers`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ...errors import ConfigError
from ..sources.documents import Document, first_line
from .encoding_rules import backend_of, encoding_rules, facts_of, text_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoder = Callable[[str], "NDArray[np.uint32]"]

BYTES = "bytes"
BPE = "bpe"
NUM_BYTES = 256
NO_LIMIT = int(1e30)
"""The length that `transformers` takes for "no limit", so that it never warns of long texts."""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose token ids are the text's UTF-8 bytes: 256 symbols, none of them special."""
    model = models.BPE(vocab=byte_vocabulary(), merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


@cache
def byte_vocabulary() -> dict[str, int]:
    """From the printable character that stands for a byte in byte-level BPE to the byte.

    Bytes that print as themselves in Latin-1 keep their character; the others, in order, get the
    characters from U+0100 on, as GPT-2 has it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    moved = {byte: NUM_BYTES + index for index, byte in enumerate(others)}
    return {chr(moved.get(byte, byte)): byte for byte in range(NUM_BYTES)}


def train_bpe(
    texts: Iterable[str], vocab_size: int, max_bytes: int | None = None
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: read once, one at a time.
        vocab_size: number of symbols, including the 256 bytes. A small corpus may give fewer.
        max_bytes: stop reading texts after about so many bytes of UTF-8.

    Raises:
        ConfigError: the vocabulary is too small for the bytes.
    """
    if vocab_size < NUM_BYTES:
        raise ConfigError(
            "data.bpe_vocab_size", vocab_size, f"must be at least {NUM_BYTES}, one per byte"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(byte_vocabulary()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to(texts, max_bytes), trainer)
    return _wrap(tokenizer)


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerBase:
    """Any tokenizer that `AutoTokenizer` knows, by its name on the hub or its folder.

    Raises:
        ConfigError: it is not there or cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_folder)
    except Exception as error:
        # A wrong name, no network, or files of another kind: `transformers` raises many types.
        raise ConfigError(
            "data.tokenizer",
            name_or_folder,
            f"cannot be loaded ({first_line(error)}); give 'bytes', 'bpe', a folder that holds a "
            "tokenizer, or a name on the hub that can be reached",
        ) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, and at least the number of tokens."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.uint32]:
    """The text's token ids, without special tokens: (L,) uint32."""
    return make_encoder(tokenizer)(text)


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """A function from text to token ids, (L,) uint32, without special tokens.

    Text that looks like a special token is encoded as text. Nothing is cut off.

    Tokenizers of the `tokenizers` library encode outside Python's lock, so that several threads
    encode at once.
    """
    backend = backend_of(tokenizer)
    if backend is None:
        how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return lambda text: np.asarray(tokenizer(text, **how)["input_ids"], dtype=np.uint32)
    if encoding_rules(backend) == _byte_rules():
        return _encode_bytes
    copy = text_only(backend)

    def encode(text: str) -> NDArray[np.uint32]:
        # Only the batch methods let other threads run.
        (encoding,) = copy.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.uint32)

    return encode


def encode_in_order(
    encode: Encoder, documents: Iterable[Document], num_workers: int, name: str = "?"
) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
    """Encode documents in several threads, give them back in order.

    Threads suffice, since the `tokenizers` library works outside Python's lock. At most
    ``num_workers`` documents are held at a time.

    Args:
        encode: from `make_encoder`.
        documents: read as they are needed.
        num_workers: threads.
        name: of the tokenizer, as the user gave it, for errors.

    Raises:
        ConfigError: the tokenizer cannot encode a document.
    """

    def ids(document: Document) -> NDArray[np.uint32]:
        if document.tokens is not None:
            return document.tokens
        try:
            return encode(document.text)
        except BaseException as error:
            # Rust's panics are no `Exception`.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(
                "data.tokenizer",
                name,
                f"cannot encode {document.name!r} ({first_line(error)}); give a tokenizer that "
                "takes any text, e.g. one with an unknown token, 'bytes' or 'bpe'",
            ) from error

    if num_workers <= 1:
        for document in documents:
            yield document, ids(document)
        return
    pending: deque[tuple[Document, Future[NDArray[np.uint32]]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for document in documents:
            pending.append((document, pool.submit(ids, document)))
            if len(pending) >= num_workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text gets."""
    return hashlib.blake2b(facts_of(tokenizer).encode(), digest_size=16).hexdigest()


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=NO_LIMIT,
        clean_up_tokenization_spaces=False,
    )


@cache
def _byte_rules() -> str:
    return encoding_rules(byte_tokenizer().backend_tokenizer)


def _encode_bytes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


def _up_to(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        read += len(text.encode("utf-8"))
        if max_bytes is not None and read >= max_bytes:
            return
