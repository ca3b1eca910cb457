"""Items of texts that are full of numbers, short, or written with the line ends of Windows."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from random import Random

import pytest
from task_texts import SETTINGS, code, isabelle, latex, texts_of
from test_task_items import build

from memorizing_studies.tasks.syntax import new_values, syntax_of

EVERY = "".join(f"{number}\n" for number in range(1000, 10_000))


@pytest.mark.parametrize("task", ["key-values", "variables"])
def test_facts_are_written_into_texts_that_are_full_of_numbers(task: str) -> None:
    """A text with all numbers of four digits, and one with all but three."""
    for text in (EVERY, re.sub("1234|5678|9012", "x", EVERY)):
        found, skipped = build(task, texts_of(text, most=50_000), replace(SETTINGS, questions=4))
        assert found
        assert not skipped
        for content, item in found:
            assert not any(candidate in text for candidate in item.candidates)
            assert {len(candidate) for candidate in item.candidates} == {6}
            assert item.candidates[item.answer] in content


@pytest.mark.parametrize("count", [1, 4, 64])
def test_new_values_are_new(count: int) -> None:
    draw = random.Random(count)
    for digits in (10, 1000, 30_000, 100_000):
        text = "".join(draw.choices("0123456789", k=digits))
        found = new_values(text, Random(0), count)
        assert len({*found}) == len(found) == count
        assert not any(number in text for number in found)
        assert len({*map(len, found)}) == 1


def test_facts_are_asked_as_far_back_as_the_longest_document_reaches() -> None:
    far = replace(SETTINGS, max_tokens=8192)
    for length, expected in ((103, set()), (104, {64}), (500, {64, 256}), (2000, {64, 256, 1024})):
        found, skipped = build("key-values", texts_of(latex(0, 60)[:length], latex()[:90]), far)
        assert {item.x for _, item in found} == expected
        assert expected or skipped


def test_line_ends_of_windows_change_nothing() -> None:
    proofs = isabelle(0).replace("(simp add: ", "simp\n  using ").replace(")\n", "\n")
    all_of_them = replace(SETTINGS, min_distance=1, questions=10_000)
    plain, _ = build("lemma-recall", texts_of(proofs, most=50_000), all_of_them)
    crlf = texts_of(proofs.replace("\n", "\r\n"), most=50_000)
    windows, _ = build("lemma-recall", crlf, all_of_them)
    assert len(plain) >= 12
    assert [item.candidates for _, item in windows] == [item.candidates for _, item in plain]
    assert {item.after for _, item in windows} == {"\r"}
    for text in ("x;\n" * 90, "if (x) {\n" * 90, code(), latex(), isabelle()):
        assert syntax_of(text.replace("\n", "\r\n")) == syntax_of(text)
