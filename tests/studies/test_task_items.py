"""The items of tasks: what is asked is not visible, and lies as far back as it is said to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any

import pytest
from task_texts import SETTINGS, bpe, code, isabelle, latex, texts_of

from memorizing_studies.tasks.items import Item, ItemSet, Sheet, load, save
from memorizing_studies.tasks.key_values import KEYS
from memorizing_studies.tasks.suite import TASKS
from memorizing_studies.tasks.syntax import SYNTAXES, syntax_of
from memorizing_studies.tasks.texts import Texts
from memorizing_transformers.data.tokens.tokenized_text import tokenize
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import ConfigError

DOCUMENTS = {"label-recall": latex, "identifier-recall": code, "lemma-recall": isabelle}
NAMES = [*DOCUMENTS]


def build(
    name: str, texts: Texts, settings: Any = SETTINGS
) -> tuple[list[tuple[str, Item]], Counter[str]]:
    """The items of a task with their texts, and what was skipped."""
    skipped: Counter[str] = Counter()
    sheets = TASKS[name].build(texts, settings, settings.random(name), skipped)
    found = [(texts.join(sheet.pieces), item) for sheet in sheets for item in sheet.items]
    return found, +skipped


def tokens_between(tokenizer: Any, text: str, begin: int, end: int) -> int:
    """Tokens that lie between two places of a text, counted one by one."""
    ends = tokenize(tokenizer, text).ends.tolist()
    starts = [0, *ends[:-1]]
    return sum(begin <= a and b <= end for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_was_last_mentioned_as_far_back_as_is_said(name: str, tokenizer: Any) -> None:
    make = DOCUMENTS[name]
    found, _ = build(name, texts_of(make(0), make(1), tokenizer=tokenizer))
    assert len(found) >= 12
    for text, item in found:
        right = item.candidates[item.answer]
        assert text[item.place :].startswith(right + item.after)
        end = text.rindex(right, 0, item.place) + len(right)
        assert item.distance == tokens_between(tokenizer, text, end, item.place)
        assert item.x <= item.distance < 2 * item.x
        assert item.distance >= SETTINGS.min_distance
    assert len({item.x for _, item in found}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_the_names_defined_so_far(name: str) -> None:
    found, _ = build(name, texts_of(DOCUMENTS[name](0)))
    for text, item in found:
        before = text[: item.place]
        assert all(candidate in before for candidate in item.candidates)
        assert len({*item.candidates}) == len(item.candidates) >= 2
        assert item.chance == 1 / len(item.candidates)
        assert 0 <= sum(item.rivals.values()) <= 2
    assert any(item.rivals["most frequent"] for _, item in found)


def test_rivals_are_the_last_and_the_most_frequent_name() -> None:
    gap = "x " * 60
    parts = ["\\label{a-1} \\label{a-2} \\label{b-1}"]
    parts += [f"\\ref{{{name}}}" for name in ("a-1", "a-1", "a-2", "b-1", "a-1", "a-2", "a-2")]
    found, _ = build("label-recall", texts_of(gap.join(parts)))
    known = [(i.candidates[i.answer], i.candidates, i.rivals["most recent"],
              i.rivals["most frequent"]) for _, i in found]  # fmt: skip
    both = ("a-1", "a-2")
    # Counted by hand, definitions too; of equally frequent names the last one counts.
    assert known == [
        ("a-1", both, 0.0, 0.0),
        ("a-1", both, 1.0, 1.0),
        ("a-2", both, 0.0, 0.0),
        ("a-1", both, 0.0, 1.0),
        ("a-2", both, 0.0, 0.0),
        ("a-2", both, 1.0, 0.0),
    ]


def test_lemmas_are_those_of_isabelle() -> None:
    text = "Theorem theorem A1x holds by using A1x\n" + "\\begin{proof} word \n" * 20
    found, skipped = build("lemma-recall", texts_of(text * 3))
    assert not found
    assert skipped == {"no lemma is used": 1}


def test_the_right_candidate_stays_where_there_are_too_many() -> None:
    few = replace(SETTINGS, candidates=4)
    found, _ = build("label-recall", texts_of(latex(0)), few)
    whole, _ = build("label-recall", texts_of(latex(0)))
    assert [item.place for _, item in found] == [item.place for _, item in whole]
    for text, item in found:
        assert len(item.candidates) == min(4, len(item.candidates))
        assert text[item.place :].startswith(item.candidates[item.answer] + "}")
    assert {len(item.candidates) for _, item in found} == {4}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe()], ids=["bytes", "bpe"])
def test_facts_are_asked_at_the_distance_that_is_said(tokenizer: Any) -> None:
    long = replace(SETTINGS, max_tokens=8192, questions=60)
    texts = texts_of(latex(0, 60), code(1) * 9, tokenizer=tokenizer, most=8192)
    found, _ = build("key-values", texts, long)
    assert {item.group.split(" ")[0] for _, item in found} == {str(keys) for keys in KEYS}
    assert {item.x for _, item in found} == {64, 256, 1024, 4096}
    for text, item in found:
        fact = item.before.removeprefix("\n") + item.candidates[item.answer] + item.after
        begin = text.rindex(fact, 0, item.place)
        assert fact not in text[begin + 1 :]
        between = tokens_between(tokenizer, text, begin + len(fact), item.place)
        # A token can hold the end of the fact and what follows it.
        assert between == item.distance == item.x


def test_the_latest_value_is_right_and_all_values_are_there() -> None:
    long = replace(SETTINGS, max_tokens=8192)
    found, _ = build("key-values", texts_of(latex(0, 60), most=8192), long)
    changed = [(text, item) for text, item in found if "latest" in item.group]
    assert changed
    for text, item in found:
        keys = int(item.group.split(" ")[0])
        written = [value for value in item.candidates if value in text[: item.place]]
        values = 2 * keys if "latest" in item.group else keys
        assert len(written) == values
        assert len(item.candidates) == max(4, values)
    for text, item in changed:
        before = item.before.removeprefix("\n")
        spoken = [at for at in range(len(text)) if text.startswith(before, at)]
        assert len(spoken) == 2
        assert text.startswith(before + item.candidates[item.answer], spoken[-1])


def test_copies_are_found_where_they_are() -> None:
    far = "the quick brown fox jumps over"
    other = "".join(chr(33 + n * 7 % 90) for n in range(90))
    near = 2 * "".join(chr(33 + n * 11 % 90) for n in range(45))
    text = f"{far} 1 {other} {far} 2 {other} {near}"
    found, _ = build("far-copies", texts_of(text), replace(SETTINGS, questions=10_000))
    places = {item.place: item for _, item in found}
    again = text.index(far, 1)
    copied = [again + n for n in range(8, len(far) + 1)]
    assert all(place in places for place in copied)
    for place in copied:
        assert places[place].distance == again
        assert places[place].rivals["suffix matcher"] == 1.0
    different = again + len(far) + 1
    assert text[different] == "2"
    assert places[different].rivals["suffix matcher"] == 0.0
    assert min(places) >= 8 + again
    for item in places.values():
        gram = text[item.place - 8 : item.place]
        last = text.rindex(gram, 0, item.place - 1)
        assert item.place - (last + 8) == item.distance >= SETTINGS.min_distance


def test_copies_of_what_other_documents_hold_are_told_apart() -> None:
    own, shared = ("".join(Random(n).choices(ascii_letters, k=400)) for n in (0, 1))
    gap = "".join(chr(33 + n * 7 % 90) for n in range(90))
    text = own + shared + gap + own + shared
    found, _ = build("far-copies", texts_of(text, shared), replace(SETTINGS, questions=10_000))
    second = len(own) + len(shared) + len(gap)
    for content, item in found:
        if content == text and second + 9 < item.place < second + 390:
            assert item.group.startswith("the document's own")
        if content == text and second + 410 < item.place < second + 790:
            assert item.group.startswith("found elsewhere too")
    assert len({item.group.split(",")[0] for _, item in found}) == 2


def test_the_seed_fixes_the_items() -> None:
    def all_items(seed: int) -> list[Sheet]:
        settings = replace(SETTINGS, seed=seed)
        texts = texts_of(latex(0, 30), code(0) * 3, isabelle(0))
        return [
            sheet
            for name, task in TASKS.items()
            for sheet in task.build(texts, settings, settings.random(name), Counter())
        ]

    assert all_items(0) == all_items(0)
    assert all_items(0) != all_items(1)


@pytest.mark.parametrize("name", TASKS)
def test_documents_without_what_is_asked_are_counted(name: str) -> None:
    found, skipped = build(name, texts_of("a b c d\n" * 12, "e" * 99))
    assert not [item for _, item in found if item.candidates]
    assert sum(skipped.values()) >= 1


def test_items_survive_a_file(tmp_path: Path) -> None:
    texts = texts_of(latex(0), latex(1))
    tasks = {
        name: TASKS[name].build(texts, SETTINGS, SETTINGS.random(name), Counter())
        for name in ("label-recall", "far-copies")
    }
    items = ItemSet(tasks, {"documents": {"empty": 2}}, {"seed": 0}, texts.digests())
    save(items, tmp_path / "items.json")
    assert load(tmp_path / "items.json") == items
    for content in ("", "{}", "[]", '{"format": 2}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match="items"):
            load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="nowhere"):
        load(tmp_path / "nowhere.json")


def test_the_syntax_of_a_document_is_recognised() -> None:
    novel = "It was a dark night, and nobody had seen the class of 1907; the end.\n" * 50
    found = [syntax_of(text).name for text in (latex(), isabelle(), code(), novel)]
    assert found == [syntax.name for syntax in SYNTAXES]
