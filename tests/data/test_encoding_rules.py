"""What decides an id: text is only text, and every part that can change an id is fingerprinted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from memorizing_transformers.data.settings import SPLITS
from memorizing_transformers.data.tokens.encoding_rules import backend_of, text_only
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.data.tokens.tokenized_text import tokenize
from memorizing_transformers.data.tokens.tokenizers import (
    encode_document,
    fingerprint_tokenizer,
    load_tokenizer,
    make_encoder,
    train_bpe,
)
from memorizing_transformers.errors import ConfigError

LETTERS = [*"abs<>/[]|_ endoftxunkCLSep▁"]


def vocabulary(*more: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys([*more, *LETTERS]))}


def byte_bpe() -> Tokenizer:
    return train_bpe(["some text, some more"], 270).backend_tokenizer


def merging_bpe() -> Tokenizer:
    names = vocabulary("<s>", "</s>", "<s", "</", "</s", "<unk>")
    merges = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
    return Tokenizer(models.BPE(names, merges, unk_token="<unk>"))


def listed_bpe() -> Tokenizer:
    return Tokenizer(models.BPE(vocabulary("<s>", "</s>", "<unk>"), [], ignore_merges=True))


def unigram() -> Tokenizer:
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces = [(name, -5.0) for name in dict.fromkeys(LETTERS)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def words() -> Tokenizer:
    names = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "s": 5}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_pieces() -> Tokenizer:
    names = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "##b": 4, "s": 5}
    tokenizer = Tokenizer(models.WordPiece(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = [byte_bpe, merging_bpe, listed_bpe, unigram, words, word_pieces]
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]


def with_special(make: Callable[[], Tokenizer]) -> PreTrainedTokenizerFast:
    backend = make()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    backend.add_tokens(["later"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("text", ["<s>", "a<s>b </s> a", " <|endoftext|> <unk> s", "<s><s>a"])
def test_text_never_becomes_a_special_token(make, text: str, tmp_path: Path) -> None:
    tokenizer = with_special(make)
    tokenizer.save_pretrained(tmp_path)
    special = {tokenizer.convert_tokens_to_ids(name) for name in SPECIAL[1:]}
    assert special & {*tokenizer.encode(text, add_special_tokens=False)} or "<unk>" in text
    for each in (tokenizer, load_tokenizer(str(tmp_path))):
        ids = encode_document(each, text).tolist()
        assert ids
        assert not special & {*ids}
    # The tokenizer itself stays as it is.
    again = tokenizer.encode("<s>", add_special_tokens=False)
    assert again == [tokenizer.convert_tokens_to_ids("<s>")]


@pytest.mark.parametrize("make", KINDS)
def test_the_inspector_sees_the_same_ids(make) -> None:
    tokenizer = with_special(make)
    text = "a <s>b </s> s"
    seen = tokenize(tokenizer, text)
    assert seen.ids.tolist() == encode_document(tokenizer, text).tolist()
    assert len(seen.ends) == len(seen.ids)
    assert "".join(seen.pieces()) == text


@pytest.mark.parametrize("make", KINDS)
def test_other_text_gets_the_ids_that_it_had(make) -> None:
    tokenizer = with_special(make)
    for text in ("a b", "ab s later a", "s", "", "later", "unknown ü"):
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert encode_document(tokenizer, text).tolist() == expected


def test_a_copy_of_a_plain_tokenizer_gives_the_same_ids() -> None:
    for make in KINDS:
        backend = make()
        text = "abs <s> a ab unk text"
        encoding = backend.encode(text, add_special_tokens=False)
        assert text_only(backend).encode(text, add_special_tokens=False).ids == encoding.ids


def test_ids_are_not_drawn() -> None:
    backend = merging_bpe()
    plain = backend.encode("<s</s<s").ids
    backend.model.dropout = 0.5
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    encode = make_encoder(tokenizer)
    assert all(encode("<s</s<s").tolist() == plain for _ in range(20))


def test_text_is_only_text_without_a_fast_backend(corpus, texts: Path, tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    tokenizer = load_tokenizer(str(tmp_path / "slow"))
    assert backend_of(tokenizer) is None
    text = "a</s>é<pad>"
    ids = encode_document(tokenizer, text).tolist()
    assert ids == [byte + 3 for byte in text.encode()]
    (texts / "special.txt").write_text(text * 30)
    folder = prepare_store(corpus(texts, tokenizer=str(tmp_path / "slow")), tmp_path / "cache")
    assert sum(len(TokenStore(folder, split)) for split in SPLITS) == 13
    again = load_tokenizer(str(folder / "tokenizer"))
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(tokenizer)


def test_a_slow_tokenizers_fingerprint_follows_what_it_saves(tmp_path: Path) -> None:
    def saved(name: str, **options: Any) -> str:
        ByT5Tokenizer(**options).save_pretrained(tmp_path / name)
        return fingerprint_tokenizer(load_tokenizer(str(tmp_path / name)))

    assert saved("a") == saved("b") == saved("c", model_max_length=7, padding_side="left")
    more = [AddedToken("xyz", special=False)]
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(more)
    assert len({saved("a"), saved("d", extra_ids=7), fingerprint_tokenizer(tokenizer)}) == 3


def rules(change: Callable[[dict[str, Any]], None], make: Callable[[], Tokenizer]) -> str:
    content = json.loads(with_special(make).backend_tokenizer.to_str())
    change(content)
    backend = Tokenizer.from_str(json.dumps(content))
    return fingerprint_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def component(value: Any) -> dict[str, Any]:
    """A part of a tokenizer as JSON has it."""
    backend = Tokenizer(models.BPE())
    kind = next(
        kind
        for kind, home in (
            ("normalizer", normalizers.Normalizer),
            ("pre_tokenizer", pre_tokenizers.PreTokenizer),
            ("decoder", decoders.Decoder),
        )
        if isinstance(value, home)
    )
    setattr(backend, kind, value)
    return {kind: json.loads(backend.to_str())[kind]}


def exchange(vocab: dict[str, int], one: str, other: str) -> None:
    vocab[one], vocab[other] = vocab[other], vocab[one]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "lower case": lambda r: r.update(component(normalizers.Lowercase())),
    "normal form": lambda r: r.update(component(normalizers.NFC())),
    "another form": lambda r: r.update(component(normalizers.NFKC())),
    "pre-tokeniser": lambda r: r.update(component(pre_tokenizers.Digits())),
    "its option": lambda r: r.update(component(pre_tokenizers.Digits(individual_digits=True))),
    "a vocabulary entry": lambda r: r["model"]["vocab"].update(new=999),
    "an exchange of ids": lambda r: exchange(r["model"]["vocab"], "a", "b"),
    "merges": lambda r: r["model"].update(merges=r["model"]["merges"][:-1]),
    "the order of merges": lambda r: r["model"].update(merges=r["model"]["merges"][::-1]),
    "byte_fallback": lambda r: r["model"].update(byte_fallback=True),
    "ignore_merges": lambda r: r["model"].update(ignore_merges=True),
    "unk": lambda r: r["model"].update(unk_token="a"),
    "fuse_unk": lambda r: r["model"].update(fuse_unk=True),
    "prefix": lambda r: r["model"].update(continuing_subword_prefix="##", merges=[]),
    "suffix": lambda r: r["model"].update(end_of_word_suffix="_", merges=[]),
    "an added token less": lambda r: r["added_tokens"].pop(),
    "an added token's content": lambda r: r["added_tokens"][-1].update(content="sooner"),
    "an added token's kind": lambda r: r["added_tokens"][-1].update(special=True),
    "an added token's place": lambda r: r["added_tokens"][-1].update(lstrip=True),
    "an added token as a word": lambda r: r["added_tokens"][-1].update(single_word=True),
    "an added token's norm": lambda r: r["added_tokens"][-1].update(normalized=False),
}
NO_CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "none": lambda r: None,
    "truncation": lambda r: r.update(
        truncation={
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }
    ),
    "padding": lambda r: r.update(
        padding={
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
        }
    ),
    "decoder": lambda r: r.update(component(decoders.ByteLevel())),
    "template": lambda r: r.update(post_processor=template()),
}  # fmt: skip


def template() -> Any:
    backend = Tokenizer(models.BPE())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return json.loads(backend.to_str())["post_processor"]


def test_every_part_that_can_change_an_id_changes_the_fingerprint() -> None:
    seen = {"as it is": rules(lambda r: None, merging_bpe)}
    seen |= {name: rules(change, merging_bpe) for name, change in CHANGES.items()}
    assert len(set(seen.values())) == len(seen), seen
    others = {rules(lambda r: None, make) for make in KINDS}
    assert len(others) == len(KINDS)


@pytest.mark.parametrize("name", NO_CHANGES)
def test_parts_that_change_no_id_leave_the_fingerprint(name: str) -> None:
    for make in (merging_bpe, unigram, words):
        assert rules(NO_CHANGES[name], make) == rules(lambda r: None, make)


def test_scores_are_part_of_the_fingerprint() -> None:
    def change(rules: dict[str, Any]) -> None:
        rules["model"]["vocab"][-1][1] = -7.5

    assert rules(change, unigram) != rules(lambda r: None, unigram)


@pytest.mark.parametrize("make", KINDS)
def test_only_stores_with_special_tokens_are_made_again(make) -> None:
    """Where special tokens used to be found in texts, the fingerprint is another one now."""
    plain = PreTrainedTokenizerFast(tokenizer_object=make())
    for tokenizer, same in ((plain, True), (with_special(make), False)):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding", "decoder", "post_processor", "version"):
            rules.pop(key, None)
        content = json.dumps(rules, sort_keys=True).encode()
        before = hashlib.blake2b(content, digest_size=16).hexdigest()
        assert (fingerprint_tokenizer(tokenizer) == before) is same


def test_special_tokens_are_part_of_the_rules() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=merging_bpe())
    assert fingerprint_tokenizer(plain) != fingerprint_tokenizer(with_special(merging_bpe))


def no_unknown_token() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"word0": 0, "word1": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def no_unknown_piece() -> Tokenizer:
    return Tokenizer(models.Unigram([("w", -1.0), ("o", -1.0)]))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("make", [no_unknown_token, no_unknown_piece])
def test_a_tokenizer_that_cannot_encode_is_named(corpus, texts, tmp_path, make, workers) -> None:
    PreTrainedTokenizerFast(tokenizer_object=make()).save_pretrained(tmp_path / "tokenizer")
    settings = corpus(texts, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError) as caught:
        prepare_store(settings, tmp_path / "cache", num_workers=workers)
    message = str(caught.value)
    assert message.startswith(f"data.tokenizer = '{tmp_path / 'tokenizer'}': cannot encode 'text")
    assert "\n" not in message
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
