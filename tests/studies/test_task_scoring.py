"""Scores: those of a text that is read anew for each candidate, and blind to what follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from task_texts import SETTINGS, bpe, code, latex, texts_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memorizing_studies.tasks.continuations import Encoder
from memorizing_studies.tasks.items import Item
from memorizing_studies.tasks.scoring import Arm, rate, score_items
from memorizing_studies.tasks.suite import TASKS
from memorizing_transformers import MemorizingTransformer, memorize
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, train_bpe

SEGMENT = 16


def copying_model(**settings: Any) -> MemorizingTransformer:
    """A model that also copies what followed where its last tokens occurred before."""
    torch.manual_seed(0)
    memory = {"size": 512, "top_k": 4, "layers": [-1], "copy": ["neighbours", "repeats"]}
    fields = {"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 256, "xl_cache": 8}
    return MemorizingTransformer(**{**fields, **settings}, memory=memory).eval()


def pretrained_model() -> Any:
    """A small model of transformers that was given a memory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
    return memorize(base, {"size": 512, "top_k": 4}, [1], xl_cache=8).eval()


def items_of(name: str, text: str, tokenizer: Any = None) -> tuple[str, list[Item]]:
    """The items of a task in one document, and their text."""
    texts = texts_of(text, tokenizer=tokenizer)
    few = replace(SETTINGS, questions=6, candidates=3, max_tokens=1024)
    (sheet, *_) = TASKS[name].build(texts, few, few.random(name), Counter())
    return texts.join(sheet.pieces), [*sheet.items]


def read_whole(arm: Arm, ids: list[int]) -> Tensor:
    """The log-likelihood of each token, all read segment by segment as training does."""
    bank = arm.model.new_memory(1, size=arm.size)
    tokens = torch.tensor([ids])
    found = []
    for start in range(0, len(ids), arm.segment):
        part = tokens[:, start : start + arm.segment]
        with torch.no_grad():
            output = arm.model(part, bank)
        bank.commit(output.pairs, token_ids=part)
        found.append(output.logits[0].log_softmax(-1))
    logits = torch.cat(found)
    return logits[:-1].gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("size", [None, 0])
@pytest.mark.parametrize("make", [copying_model, pretrained_model])
def test_a_choice_is_scored_as_if_the_text_were_read_anew(make: Any, size: int | None) -> None:
    arm = Arm("arm", make(), SEGMENT, size)
    text, items = items_of("label-recall", latex(0, 3)[:1000])
    encoder = Encoder(byte_tokenizer())
    assert len(items) >= 3
    scores = score_items(arm, encoder, text, items)
    for item, score in zip(items[::2], scores[::2], strict=True):
        before = text[: item.place].encode()
        expected = []
        for candidate in item.candidates:
            ids = [*before, *candidate.encode(), *item.after.encode()]
            expected.append(float(read_whole(arm, ids)[len(before) - 1 :].sum()))
        assert score.nats == pytest.approx(-expected[item.answer], abs=1e-3)
        same = rate(expected, item.answer, score.tokens)
        assert (score.right, score.reciprocal_rank) == (same.right, same.reciprocal_rank)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("name", ["label-recall", "identifier-recall", "key-values"])
def test_nothing_after_a_place_changes_a_score(name: str, tokenizer: Any) -> None:
    """A reader that sees the answer would be right everywhere, and would notice another one."""
    arm = Arm("arm", copying_model(vocab_size=len(tokenizer)), SEGMENT)
    make = code if name == "identifier-recall" else latex
    text, items = items_of(name, make(0)[:1600], tokenizer)
    encoder = Encoder(tokenizer)
    scores = score_items(arm, encoder, text, items)
    for item, score in zip(items[::4], scores[::4], strict=True):
        changed = text[: item.place] + "Z" * (len(text) - item.place)
        (alone,) = score_items(arm, encoder, changed, [item])
        assert alone.nats == pytest.approx(score.nats, abs=1e-3)
        assert alone.reciprocal_rank == score.reciprocal_rank


def test_each_item_is_scored_as_it_is_alone() -> None:
    """Asking one item leaves no trace in what is read for the next one."""
    arm = Arm("arm", copying_model(), SEGMENT)
    text, items = items_of("key-values", latex(0, 3)[:700])
    parts = [Item(place=n, end=n + 9, x=0, distance=0, chance=0.0) for n in range(9, 200, 60)]
    encoder = Encoder(byte_tokenizer())
    mixed = [*items, *parts]
    for item, score in zip(mixed, score_items(arm, encoder, text, mixed), strict=True):
        (alone,) = score_items(arm, encoder, text, [item])
        assert alone.nats == pytest.approx(score.nats, abs=1e-3)
        assert (alone.right, alone.tokens) == (score.right, score.tokens)


def test_the_loss_of_a_part_is_that_of_its_tokens() -> None:
    arm = Arm("arm", copying_model(), SEGMENT)
    text = latex()[:300]
    parts = [(64, 65), (70, 85), (299, 300), (1, 2)]
    items = [Item(place=a, end=b, x=0, distance=0, chance=0.0) for a, b in parts]
    whole = read_whole(arm, [*text.encode()])
    for (a, b), score in zip(parts, score_items(arm, Encoder(byte_tokenizer()), text, items),
                             strict=True):  # fmt: skip
        assert score.nats == pytest.approx(-float(whole[a - 1 : b - 1].mean()), abs=1e-3)
        assert score.tokens == b - a
        assert score.reciprocal_rank is None


def test_a_part_is_as_right_as_its_tokens() -> None:
    """The model expects the token with the next number."""
    model: Any = copying_model()
    arm = Arm("arm", model, SEGMENT)
    plain = model.forward

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Any:
        output = plain(input_ids, *args, **options)
        logits = torch.nn.functional.one_hot((input_ids + 1) % 256, 256) * 50.0
        return replace(output, logits=logits)

    model.forward = forward
    text = "abcdefg" + "xx" + "hijk"
    parts = {(1, 7): 1.0, (6, 8): 0.5, (8, 9): 0.0, (10, 13): 1.0}
    items = [Item(place=a, end=b, x=0, distance=0, chance=0.0) for a, b in parts]
    scores = score_items(arm, Encoder(byte_tokenizer()), text, items)
    assert [score.right for score in scores] == [*parts.values()]
    choice = Item(place=3, x=0, distance=0, chance=0.5, candidates=("de", "aq", "dx"), after="f")
    (score,) = score_items(arm, Encoder(byte_tokenizer()), text, [choice])
    assert (score.right, score.reciprocal_rank) == (1.0, 1.0)
    (score,) = score_items(arm, Encoder(byte_tokenizer()), text, [replace(choice, answer=2)])
    assert (score.right, score.reciprocal_rank) == (0.0, 1 / 2)


def test_the_memory_gives_what_lies_far_back() -> None:
    """The copies of a model with memory find a value; without memory it is a guess."""
    model = copying_model()
    with torch.no_grad():
        model.copy_head.sources["repeats"].log_odds.fill_(5.0)  # type: ignore[union-attr,index]
    texts = texts_of(latex(0, 20))
    few = replace(SETTINGS, max_tokens=512, questions=60)
    right: dict[str, list[float]] = {"on": [], "off": []}
    for sheet in TASKS["key-values"].build(texts, few, few.random("key-values"), Counter()):
        text, encoder = texts.join(sheet.pieces), Encoder(byte_tokenizer())
        items = [item for item in sheet.items if item.group in ("1 key", "4 keys")]
        for name, size in (("on", 512), ("off", 0)):
            arm = Arm(name, model, SEGMENT, size)
            right[name] += [score.right for score in score_items(arm, encoder, text, items)]
    assert len(right["on"]) >= 12
    assert sum(right["on"]) / len(right["on"]) > 0.9
    assert sum(right["off"]) / len(right["off"]) < 0.6


def test_equal_candidates_share_the_point() -> None:
    assert rate([-1.0, -1.0, -2.0], 0, 3).right == 0.5
    assert rate([-1.0, -1.0, -2.0], 1, 3).reciprocal_rank == 1 / 1.5
    assert rate([-1.0, -1.0, -2.0], 2, 3).right == 0.0
    assert rate([-1.0, -0.5, -2.0], 2, 3).reciprocal_rank == 1 / 3


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe()], ids=["bytes", "bpe"])
def test_candidates_are_encoded_as_they_would_stand_in_the_text(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    for name, make in (("label-recall", latex), ("identifier-recall", code)):
        text, items = items_of(name, make(), tokenizer)
        tokens = encoder.text(text)
        for item in items:
            choice = encoder.choice(tokens, item)
            assert int(tokens.ends[choice.start - 1]) <= item.place
            lead = text[int(tokens.ends[choice.start - 1]) : item.place]
            for candidate, ids in zip(item.candidates, choice.candidates, strict=True):
                assert tokenizer.decode(ids) == lead + candidate + item.after
                assert encoder.text(text[: item.place] + candidate + item.after).ids.tolist() == [
                    *tokens.ids[: choice.start],
                    *ids,
                ]


def test_candidates_begin_where_a_token_ends_for_all_of_them() -> None:
    tokenizer = train_bpe(["() () () () (a (b f f"], 300)
    encoder = Encoder(tokenizer)
    text = "f(a)"
    item = Item(place=2, x=0, distance=0, chance=0.5, candidates=(")", "a"))
    choice = encoder.choice(encoder.text(text), item)
    assert choice.start == 1
    assert [tokenizer.decode(ids) for ids in choice.candidates] == ["()", "(a"]


def test_text_before_the_candidates_is_not_scored() -> None:
    encoder, arm = Encoder(bpe()), Arm("arm", copying_model(vocab_size=len(bpe())), SEGMENT)
    text = latex()[:200]
    plain = Item(place=100, x=0, distance=0, chance=0.5, candidates=("4711", "1234"), after="}")
    item = replace(plain, before="\nzulu = ")
    choice = encoder.choice(encoder.text(text), item)
    begin = encoder.text(text).ends[choice.start - 1]
    read = bpe().decode(choice.candidates[0][: choice.unscored])
    assert read.rstrip(" ") == text[begin:100] + "\nzulu ="
    (score,) = score_items(arm, encoder, text, [item])
    assert score.tokens == len(choice.candidates[0]) - choice.unscored
    ids = [*encoder.text(text).ids[: choice.start].tolist(), *choice.candidates[0]]
    expected = -float(read_whole(arm, ids)[choice.start + choice.unscored - 1 :].sum())
    assert score.nats == pytest.approx(expected, abs=1e-3)
