"""Functions, chains of variables, several documents and key tokens: what is asked, and of what."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from task_texts import SETTINGS, bpe, code, latex, texts_of
from test_task_items import build, tokens_between
from test_task_scoring import SEGMENT, copying_model

from memorizing_studies.tasks.continuations import Encoder
from memorizing_studies.tasks.many_documents import COUNTS
from memorizing_studies.tasks.scoring import Arm, score_items
from memorizing_studies.tasks.suite import TASKS
from memorizing_studies.tasks.syntax import SYNTAXES
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer

BOTH = pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe()], ids=["bytes", "bpe"])


@BOTH
def test_the_kth_use_of_a_function_has_one_use_less_before_it(tokenizer: Any) -> None:
    texts = texts_of(latex(0, 60), code(1) * 9, tokenizer=tokenizer, most=8192)
    found, _ = build("new-function", texts, replace(SETTINGS, max_tokens=8192))
    assert {item.x for _, item in found} == {1, 2, 4, 8}
    assert {item.group for _, item in found} == {"64 tokens apart", "256 tokens apart"}
    for text, item in found:
        call = item.before + item.candidates[item.answer] + item.after
        assert text.startswith(call, item.place)
        assert text[: item.place].count(call) == item.x - 1
        others = [c for c in item.candidates if c != item.candidates[item.answer]]
        assert len({*others}) == 3
        assert not any(other in text for other in others)
        name = item.before.strip("\n$\\({ ").removeprefix('term "')
        last = text.rindex(name, 0, item.place)
        end = text.index("\n", last) + 1
        if item.x > 1:
            assert item.distance == tokens_between(tokenizer, text, end, item.place)
        apart = int(item.group.split(" ")[0])
        assert apart - 4 <= item.distance <= apart


def test_a_chain_leads_to_its_value() -> None:
    texts = texts_of(code(0) * 3)
    found, _ = build("variables", texts, replace(SETTINGS, questions=64))
    assert {item.x for _, item in found} == {0, 1, 2, 3}
    for text, item in found:
        name, hops = item.before.strip("\n ="), 0
        while True:
            (line,) = [one for one in text.split("\n") if one.startswith(f"{name} = ")]
            name = line.removeprefix(f"{name} = ")
            if name.isdigit():
                break
            hops += 1
        assert hops == item.x
        assert name == item.candidates[item.answer]
        assert sum(candidate in text for candidate in item.candidates) == 4
        line = item.before.removeprefix("\n")
        end = text.index("\n", text.index(line)) + 1
        assert item.distance == item.place - end >= SETTINGS.min_distance


@BOTH
def test_the_same_tokens_are_scored_after_more_and_more_documents(tokenizer: Any) -> None:
    texts = texts_of(*(latex(n, 20) for n in range(3)), "short", tokenizer=tokenizer)
    found, _ = build("many-documents", texts, replace(SETTINGS, questions=16))
    assert [item.x for _, item in found] == [*COUNTS] * 2
    for first in range(0, len(found), len(COUNTS)):
        own = found[first : first + len(COUNTS)]
        assert len({text[item.place : item.end] for text, item in own}) == 1
        assert len({text[-(item.end - item.place) * 4 :] for text, item in own}) == 1
        lengths = [len(tokenizer(text).input_ids) for text, _ in own]
        assert lengths == pytest.approx([64 * (4 * count + 1) for count in COUNTS], abs=10)
        target = own[0][0]
        for (before, _), (after, _) in pairwise(own):
            assert before.endswith(target)
            assert after.startswith(before.removesuffix(target))


def test_key_tokens_are_those_that_the_reference_takes_from_its_memory() -> None:
    model = copying_model()
    with torch.no_grad():
        model.copy_head.sources["repeats"].log_odds.fill_(5.0)  # type: ignore[union-attr,index]
    words = "".join(chr(33 + n * 7 % 90) for n in range(90))
    text = words + " " * 70 + words
    texts = texts_of(text)
    assert build("key-tokens", texts)[1] == {"no reference model was given": 1}
    texts.reference = Arm("reference", model, SEGMENT)
    found, _ = build("key-tokens", texts)
    assert len(found) > 40
    again = [item for _, item in found if item.place > 165]
    assert len(again) > 40
    encoder, items = Encoder(byte_tokenizer()), [item for _, item in found]
    on, off = (
        [score.nats for score in score_items(Arm("x", model, SEGMENT, n), encoder, text, items)]
        for n in (None, 0)
    )
    assert max(on) < 2
    assert all(b - a > 2 for a, b in zip(on, off, strict=True))
    texts.reference = Arm("reference", copying_model(), SEGMENT, 0)
    found, skipped = build("key-tokens", texts)
    assert not found
    assert sum(skipped.values()) == 1


def test_every_syntax_can_be_written() -> None:
    for syntax in SYNTAXES:
        fact, call = syntax.fact, syntax.call
        parts = [fact[0], call[0], syntax.function, syntax.reference]
        written = [part.format(name="zulu") for part in parts]
        assert all("zulu" in part and "{{" not in part for part in written)
        assert fact[1].endswith("\n")
        assert call[1].endswith("\n")


def test_a_function_needs_a_long_document() -> None:
    skipped: Counter[str] = Counter()
    texts = texts_of(latex()[:300])
    for name in ("new-function", "variables", "many-documents"):
        sheets = TASKS[name].build(texts, SETTINGS, SETTINGS.random(name), skipped)
        assert not sheets or name == "variables"
    assert skipped
