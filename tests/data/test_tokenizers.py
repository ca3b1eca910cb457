"""Tokenizers: nothing is ever unknown, and what is decoded is what was encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from memorizing_transformers.data.sources.documents import Document
from memorizing_transformers.data.tokens import tokenizers as tokenization
from memorizing_transformers.data.tokens.tokenizers import (
    byte_tokenizer,
    encode_document,
    encode_in_order,
    fingerprint_tokenizer,
    load_tokenizer,
    make_encoder,
    train_bpe,
    vocabulary_size,
)
from memorizing_transformers.errors import ConfigError

TEXTS = [
    "",
    " ",
    "plain text, twice  spaced\n\ttabs\r\n",
    "naïve Übermut — 漢字 🤖👩‍👩‍👧 \u0000\x7f\xa0\xad",
    "<|endoftext|> [CLS] </s> <s>",
    "".join(chr(c) for c in range(0x300)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_are_bytes_by_either_way(text: str) -> None:
    tokenizer = byte_tokenizer()
    expected = list(text.encode("utf-8"))
    assert tokenizer.encode(text) == expected
    assert tokenizer(text)["input_ids"] == expected
    ids = encode_document(tokenizer, text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == expected
    assert tokenizer.decode(expected) == text


def test_byte_tokenizer_has_256_tokens_and_none_special() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == vocabulary_size(tokenizer) == 256
    assert tokenizer.all_special_tokens == []
    assert encode_document(tokenizer, "ab" * 100_000).shape == (200_000,)


def test_long_texts_give_no_warning(caplog, recwarn) -> None:
    byte_tokenizer()("a" * 5000)
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_is_loaded_by_auto_tokenizer(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for text in TEXTS:
            ids = loaded.encode(text)
            assert ids == tokenizer.encode(text)
            assert loaded.decode(ids) == text
        assert fingerprint_tokenizer(loaded) == fingerprint_tokenizer(tokenizer)


def test_a_loaded_byte_tokenizer_takes_the_fast_way(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert make_encoder(load_tokenizer(str(tmp_path))) is tokenization._encode_bytes
    assert make_encoder(train_bpe(TEXTS, 256)) is not tokenization._encode_bytes


def test_bpe_is_the_same_each_time_and_knows_every_text() -> None:
    corpus = ["the cat sat on the mat", "the rat sat on the hat"] * 5
    first, second = train_bpe(iter(corpus), 270), train_bpe(iter(corpus), 270)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 270
    assert fingerprint_tokenizer(first) != fingerprint_tokenizer(train_bpe(corpus, 265))
    for text in TEXTS:
        ids = encode_document(first, text)
        assert ids.tolist() == first.encode(text)
        assert first.decode(ids.tolist()) == text
    assert len(first.encode(corpus[0])) < len(corpus[0])


def test_bpe_training_stops_after_so_many_bytes() -> None:
    read = []

    def texts():
        for index in range(100):
            read.append(index)
            yield "x" * 10

    train_bpe(texts(), 256, max_bytes=35)
    assert len(read) == 4


def test_an_error_while_reading_leaves_bpe_training_as_it_is() -> None:
    def texts():
        yield "abc"
        raise ConfigError("data.source", "x", "cannot be read")

    with pytest.raises(ConfigError, match="cannot be read"):
        train_bpe(texts(), 300)


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.bpe_vocab_size = 255: must be at least 256"):
        train_bpe(["text"], 255)


def test_a_tokenizer_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*give 'bytes'") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_documents_are_encoded_in_order_and_few_are_held(workers: int) -> None:
    encode = make_encoder(train_bpe(TEXTS, 300))
    taken = 0

    def documents():
        nonlocal taken
        for index in range(40):
            taken += 1
            yield Document(str(index), f"text {index} " * (40 - index))

    for given, (document, tokens) in enumerate(encode_in_order(encode, documents(), workers)):
        assert document.name == str(given)
        assert tokens.tolist() == encode(document.text).tolist()
        assert taken - given <= workers


def test_special_tokens_are_not_added(tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text"], 260)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 260), ("</s>", 261)]
    )
    assert tokenizer.encode("some text")[0] == 260
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokens = encode_document(tokenizer, "some text")
    assert tokenizer.decode(tokens.tolist()) == "some text"
    assert 3 < len(tokens) < 99
