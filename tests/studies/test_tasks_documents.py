"""The documents that tasks are made of: their names, and which are read or skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from task_texts import latex
from transformers import ByT5Tokenizer

from memorizing_studies.tasks.items import Piece
from memorizing_studies.tasks.running import Request, make_items
from memorizing_studies.tasks.task import Settings
from memorizing_studies.tasks.texts import NO_PLACES, Texts, open_texts
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import ConfigError

MOST = 512


def records(path: Path, *documents: tuple[str, str]) -> str:
    lines = (json.dumps({"title": name, "text": text}) for name, text in documents)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


def opened(
    *files: str | Path, tokenizer: Any = None, most: int = 16, column: str = "text"
) -> Texts:
    names = [str(file) for file in files]
    return open_texts(names, tokenizer or byte_tokenizer(), MOST, 64, most, column)


def text(number: int) -> str:
    return f"number {number}\n" + latex(number)


def named(texts: Texts) -> dict[str, str]:
    return {one.name: one.text for one in texts.texts}


@pytest.mark.parametrize(
    "titles",
    [(["x", "x"], ["x"]), (["x (2)", "x"], ["x", "x"]), (["a"], ["a"], ["a", "a (2)"])],
)
def test_documents_of_several_files_have_names_of_their_own(
    titles: Sequence[Sequence[str]], tmp_path: Path
) -> None:
    files, written = [], []
    for number, own in enumerate(titles):
        documents = [(title, text(len(written) + n)) for n, title in enumerate(own)]
        written += [content for _, content in documents]
        files.append(records(tmp_path / f"{number}.jsonl", *documents))
    texts = opened(*files)
    found = named(texts)
    assert len(found) == len(written)
    assert [*found.values()] == [content[: MOST * 16] for content in written]
    for name, content in found.items():
        assert texts.join([Piece(name, 0, 40)]) == content[:40]


def test_documents_after_the_last_that_is_wanted_are_not_read(tmp_path: Path) -> None:
    first = records(tmp_path / "a.jsonl", ("short", "x"), *((f"{n}", text(n)) for n in range(4)))
    # A reader that came as far would refuse these.
    with open(first, "a") as file:
        file.write("no json\n")
    (tmp_path / "b.jsonl").write_text("no json\n")
    texts = opened(first, tmp_path / "b.jsonl", most=3)
    assert [*named(texts)] == ["0", "1", "2"]
    assert texts.skipped == {"too short": 1}
    assert texts.notes == ["documents after the first 3 usable ones were not read"]
    whole = records(tmp_path / "c.jsonl", *((f"{n}", text(n)) for n in range(3)))
    assert not opened(whole, most=3).notes


def test_binary_files_among_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a.bin", "pictures/b.png", "pictures/c.png"):
        (tmp_path / name).write_bytes(b"\x89\0" * 400)
    (tmp_path / "sets.txt").write_text(text(0))
    texts = opened(*(tmp_path / name for name in ("a.bin", "sets.txt", "pictures")))
    assert [*named(texts)] == ["sets.txt"]
    assert texts.skipped == {"binary": 3}


def test_copies_of_a_document_are_skipped(tmp_path: Path) -> None:
    """Else a part that is scored stands in the memory as a part of another document."""
    content = text(0) * 9
    copy = content[: MOST * 16] + "more that is not looked at"
    documents = [("a", content), ("b", copy), ("c", text(1)), ("short", "x"), ("short", "x")]
    texts = opened(records(tmp_path / "a.jsonl", *documents))
    assert [*named(texts)] == ["a", "c"]
    assert texts.skipped == {"a copy of another document": 1, "too short": 2}


def test_a_tokenizer_of_renderings_reads_only_what_it_renders_as_it_is(tmp_path: Path) -> None:
    documents = [("plain", text(0)), ("early", f"Größe {text(1)}"), ("late", f"{text(2)} Größe")]
    texts = opened(records(tmp_path / "a.jsonl", *documents), tokenizer=ByT5Tokenizer())
    # The first tokens of the last one are as they are.
    assert [*named(texts)] == ["plain", "late"]
    assert texts.skipped == {NO_PLACES: 1}
    for one in texts.texts:
        assert one.tokens.text == one.text[:MOST]
        assert one.tokens.ends.tolist() == [*range(1, MOST + 1)]


def test_a_background_that_holds_the_documents_makes_none_of_their_copies_known(
    tmp_path: Path,
) -> None:
    data = records(tmp_path / "data.jsonl", ("a", latex(0)))
    training = records(tmp_path / "training.jsonl", ("b", text(7) + latex(0)))
    settings = Settings(min_distance=64, max_tokens=512)

    def groups(*background: str) -> tuple[set[str], Any]:
        request = Request("", [data], None, None, "", ["far-copies"], None, background, settings,
                          1, "text", None, None, None)  # fmt: skip
        items = make_items(request, opened(data, most=1), byte_tokenizer())
        found = {item.group for sheet in items.tasks["far-copies"] for item in sheet.items}
        return {group.split(",")[0] for group in found}, items.skipped["background"]

    plain, skipped = groups()
    assert (plain, skipped) == ({"the document's own"}, {})
    assert groups(data) == (plain, {"also in --data": 1})
    assert groups(data, training)[0] != plain


def test_remedies_are_those_of_this_command(tmp_path: Path) -> None:
    sets = records(tmp_path / "sets.jsonl", ("a", text(0)))
    for files, column, words in (
        ([tmp_path / "nowhere"], "text", r"nowhere': no .*; give a file, a folder or a glob$"),
        ([sets], "", r"^text_column = '': names no column"),
        ([sets], "body", r"data = .*; set text_column to one of"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as error:
            opened(*files, column=column)
        assert "hub:" not in str(error.value)
        assert "data.text_column" not in str(error.value)
