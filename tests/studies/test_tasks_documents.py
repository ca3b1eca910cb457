"""The documents that tasks are made of: their names, and which are read or skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from task_texts import latex

from memorizing_studies.tasks.items import Piece
from memorizing_studies.tasks.texts import Texts, open_texts
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
    assert texts.notes == ["documents after the first 3 that can be used: not read"]
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
