"""Tokens that datatrove made are a corpus like the texts behind them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from memorizing_studies.tasks.texts import open_texts
from memorizing_transformers.data.settings import CorpusSettings
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.data.tokens.tokenizers import make_encoder, train_bpe
from memorizing_transformers.errors import ConfigError

WHOLE = {"validation_fraction": 0, "test_fraction": 0}
WORDS = ["theorem", "lemma", "proof", "scheme", "morphism", "sheaf", "größer", "module", "prime"]
TEXTS = [
    f"{n}: {' '.join(WORDS[n * k % 9] for k in range(30))} <|end|> of {'word ' * n}\n"
    for n in range(1, 10)
]
SPECIAL = ["<|begin|>", "<|end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer that knows special tokens."""
    return save(train_bpe(TEXTS, 320), tmp_path_factory.mktemp("tokenizer"))


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True) for name in SPECIAL]}
    )
    tokenizer.save_pretrained(folder)
    return folder


def encoded(tokenizer: Path, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    encode = make_encoder(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    return [encode(text).tolist() for text in texts]


def write(file: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    """Write tokens as datatrove does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.asarray([token for document in documents for token in document], dtype).tofile(file)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{file}.index")
    count = sum(map(len, documents))
    Path(f"{file}.metadata").write_text(f"made-by/this|{np.dtype(dtype).itemsize}\n{count}\n1 kT")
    return file


Stored = Callable[..., TokenStore]


@pytest.fixture
def stored(corpus, tokenizer, tmp_path) -> Stored:
    """The training documents of a source."""

    def store(source: Path, **options: Any) -> TokenStore:
        settings: CorpusSettings = corpus(
            source, **{"tokenizer": str(tokenizer), **WHOLE, **options}
        )
        return TokenStore(prepare_store(settings, tmp_path / "cache"), "train")

    return store


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_are_the_corpus_that_their_texts_are(stored, tokenizer, tmp_path, dtype) -> None:
    text = tmp_path / "texts.jsonl.gz"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    text.write_bytes(gzip.compress(lines.encode()))
    begin, end = PreTrainedTokenizerFast.from_pretrained(tokenizer).convert_tokens_to_ids(SPECIAL)
    documents = [[begin, *tokens, end] for tokens in encoded(tokenizer)]
    write(tmp_path / "tokens" / "00000_unshuffled.ds", documents[:5], dtype)
    write(tmp_path / "tokens" / "00001_unshuffled.ds", documents[5:], dtype)
    made, own = stored(tmp_path / "tokens"), stored(text)
    assert made.folder != own.folder
    assert np.array_equal(made.tokens, own.tokens)
    assert np.array_equal(made.offsets, own.offsets)
    assert np.array_equal(made.num_bytes, own.num_bytes)
    assert made.names[4:6] == ["00000_unshuffled.ds-000004", "00001_unshuffled.ds-000000"]


def test_special_tokens_inside_stay(stored, tokenizer, tmp_path) -> None:
    (_, end) = PreTrainedTokenizerFast.from_pretrained(tokenizer).convert_tokens_to_ids(SPECIAL)
    first, second = encoded(tokenizer)[:2]
    write(tmp_path / "a.ds", [[*first, end, *second, end]])
    store = stored(tmp_path / "a.ds")
    assert store.document(0).tolist() == [*first, end, *second]
    size = len((TEXTS[0] + SPECIAL[1] + TEXTS[1]).encode())
    assert store.num_bytes.tolist() == [size]


def test_short_documents_are_left_out(stored, tokenizer, tmp_path) -> None:
    tokens = encoded(tokenizer)
    write(tmp_path / "a.ds", [tokens[8], [], tokens[1][:1], tokens[1], tokens[2]])
    assert len(stored(tmp_path / "a.ds")) == 3
    shortest = len(TEXTS[2])
    assert stored(tmp_path / "a.ds", min_characters=shortest).names == ["a.ds-000000",
                                                                        "a.ds-000004"]  # fmt: skip
    assert stored(tmp_path / "a.ds", min_tokens=len(tokens[8])).names == ["a.ds-000000"]


def test_splits_are_by_name_and_a_file_of_validation_is_not_trained_on(
    corpus, tokenizer, tmp_path
) -> None:
    tokens = encoded(tokenizer) * 20
    write(tmp_path / "tokens" / "0.ds", tokens)
    write(tmp_path / "tokens" / "1.ds", tokens[:7])
    cut = corpus(tmp_path / "tokens", tokenizer=str(tokenizer))
    folder = prepare_store(cut, tmp_path / "cache")
    names = [set(TokenStore(folder, split).names) for split in ("train", "validation", "test")]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names)) == 187
    apart = corpus(
        tmp_path / "tokens",
        tokenizer=str(tokenizer),
        validation_source=str(tmp_path / "tokens" / "1.ds"),
        test_fraction=0,
    )
    folder = prepare_store(apart, tmp_path / "cache")
    assert {name[:4] for name in TokenStore(folder, "train").names} == {"0.ds"}
    assert len(TokenStore(folder, "validation")) == 7


def test_a_new_index_alone_makes_another_corpus(stored, tokenizer, tmp_path) -> None:
    first, second = encoded(tokenizer)[:2]
    write(tmp_path / "a.ds", [first, second])
    assert len(stored(tmp_path / "a.ds")) == 2
    np.asarray([len(first) + len(second)], "<u8").tofile(tmp_path / "a.ds.index")
    assert len(stored(tmp_path / "a.ds")) == 1


def test_loss_masks_are_not_used_and_that_is_said(stored, tokenizer, tmp_path, caplog) -> None:
    write(tmp_path / "tokens" / "a.ds", encoded(tokenizer))
    (tmp_path / "tokens" / "a.ds.loss").write_bytes(b"\1")
    stored(tmp_path / "tokens")
    assert "loss masks of 1 files are not used" in caplog.text


def other_tokenizer(folder: Path) -> Path:
    """As many tokens, with other meanings."""
    texts = [" ".join(str(n**5) for n in range(500))]
    return save(train_bpe(texts, 320), folder)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "another", "smaller"])
def test_another_tokenizer_is_refused(stored, tokenizer, tmp_path, kind) -> None:
    write(tmp_path / "a.ds", encoded(tokenizer))
    folder = tmp_path / "other"
    name = kind if kind in ("bytes", "bpe") else str(folder)
    if kind == "another":
        other_tokenizer(folder)
    elif kind == "smaller":
        save(train_bpe(TEXTS, 256), folder)
    why = {"another": "of the tokens that were checked", "smaller": "has 258 tokens, and"}
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*made-by/this") as error:
        stored(tmp_path / "a.ds", tokenizer=name)
    assert why.get(kind, "made no such file") in str(error.value)


def test_a_tokenizer_whose_special_tokens_are_plain_text_of_another_is_refused(
    stored, tokenizer, tmp_path
) -> None:
    """GPT-2 has ``!"#$%&'()*+,-./`` where newer vocabularies have special tokens."""
    write(tmp_path / "a.ds", encoded(tokenizer, [f"{text}, {text}, {text}." for text in TEXTS]))
    syllables = ["ba", "lo", "ri", "ne", "tu"]
    words = ["".join(syllables[n // 5**k % 5] for k in range(5)) for n in range(5**5)]
    rules = json.loads(train_bpe([" ".join(words)], 400).backend_tokenizer.to_str())
    low = {index: name for name, index in rules["model"]["vocab"].items() if index < 17}
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    rules["added_tokens"] = [
        {"id": index, "content": low[index], "special": True, **kind} for index in sorted(low)
    ]
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    save(changed, tmp_path / "other")
    with pytest.raises(ConfigError, match="of the tokens that were checked"):
        stored(tmp_path / "a.ds", tokenizer=str(tmp_path / "other"))


def word_pieces(folder: Path) -> Path:
    """A tokenizer that changes texts, and does not know every character."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", sep_token="[SEP]")
    fast.save_pretrained(folder)
    return folder


def test_a_tokenizer_with_unknown_characters_keeps_them(stored, tmp_path) -> None:
    folder = word_pieces(tmp_path / "tokenizer")
    texts = [f"{text} \u2603" for text in TEXTS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    separator = PreTrainedTokenizerFast.from_pretrained(folder).sep_token_id
    write(tmp_path / "a.ds", [[*ids, separator] for ids in encoded(folder, texts)])
    made, own = (stored(tmp_path / n, tokenizer=str(folder)) for n in ("a.ds", "t.jsonl"))
    assert np.array_equal(made.tokens, own.tokens)
    assert np.array_equal(made.offsets, own.offsets)


def test_a_tokenizer_that_cannot_be_checked_is_named(stored, tmp_path, caplog) -> None:
    folder = word_pieces(tmp_path / "tokenizer")
    ids = encoded(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "xy"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    write(tmp_path / "a.ds", ids)
    stored(tmp_path / "a.ds", tokenizer=str(folder))
    assert "nobody can tell whether it made the tokens" in caplog.text


def damage_size(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_order(file: Path) -> None:
    ends = np.fromfile(f"{file}.index", "<u8")
    ends[0], ends[1] = ends[1], ends[0]
    ends.tofile(f"{file}.index")


def damage_end(file: Path) -> None:
    np.fromfile(f"{file}.index", "<u8")[:-1].tofile(f"{file}.index")


def add_text(file: Path) -> None:
    (file.parent / "notes.txt").write_text("a text")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage_size, "write both anew"),
        (damage_order, "write both anew"),
        (damage_end, "write both anew"),
        (add_text, r"notes\.txt does not; give the files of tokens a folder of their own"),
    ],
)
def test_files_that_do_not_fit_are_refused(stored, tokenizer, tmp_path, change, words) -> None:
    change(write(tmp_path / "tokens" / "a.ds", encoded(tokenizer)))
    with pytest.raises(ConfigError, match=words):
        stored(tmp_path / "tokens")


def test_documents_are_not_joined(stored, tokenizer, tmp_path) -> None:
    write(tmp_path / "tokens" / "a.ds", encoded(tokenizer))
    with pytest.raises(ConfigError, match="set it to 'file'"):
        stored(tmp_path / "tokens", group="folder")
    with pytest.raises(ConfigError, match="is for records"):
        stored(tmp_path / "tokens", where={"language": "en"})


def test_a_text_whose_name_ends_alike_is_a_text(stored, tmp_path) -> None:
    (tmp_path / "notes.ds").write_text("some text")
    assert stored(tmp_path / "notes.ds").names == ["notes.ds"]


def test_tasks_ask_for_texts(tokenizer, tmp_path) -> None:
    write(tmp_path / "a.ds", encoded(tokenizer))
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    with pytest.raises(ConfigError, match="holds tokens and no text; give texts"):
        open_texts([str(tmp_path / "a.ds")], loaded, 99, 1, 9)
