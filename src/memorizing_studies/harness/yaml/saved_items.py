"""Choices that the command `tasks` made, as a dataset of lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from memorizing_studies.tasks.items import Item, load
from memorizing_studies.tasks.texts import find_texts
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import ConfigError

LONGEST_WORD = 100
LAST_WORD = re.compile(r"\S*\Z")


def choices(
    recall: str = "",
    items: str | None = None,
    data: str | Sequence[str] = (),
    text_column: str = "text",
    **others: Any,
) -> dict[str, Dataset]:
    """The questions of one task, each with the text before it.

    Args:
        recall: name of the task in ``items``, from the YAML file.
        items: an ``items.json`` that the command `tasks` wrote.
        data: the documents that it was made of.
        text_column: column of records that holds the text.
        others: what the harness tells of the model; not used.

    Raises:
        ConfigError: where one of them is missing or does not fit.
    """
    if items is None or not data:
        remedy = 'give --metadata \'{"items": "tasks/items.json", "data": "papers.jsonl.gz"}\''
        raise ConfigError("metadata", {"items": items, "data": data}, remedy)
    known = load(Path(items))
    if recall not in known.tasks:
        raise ConfigError("metadata.items", items, f"holds no items of {recall}")
    files = [data] if isinstance(data, str) else [*data]
    # Places are in characters, so any tokenizer does.
    most = known.settings.get("max_tokens")
    if not isinstance(most, int):
        raise ConfigError("metadata.items", items, "does not say max_tokens; write it anew")
    texts = find_texts(files, byte_tokenizer(), most, known.digests, text_column)
    digests = texts.digests()
    rows = []
    for sheet in known.tasks[recall]:
        for piece in sheet.pieces:
            name = piece.document
            if name and digests.get(name) != known.digests[name]:
                remedy = f"{items} asks about document {name!r}, which it holds otherwise or not"
                raise ConfigError("metadata.data", data, remedy)
        whole = texts.join(sheet.pieces)
        rows += [_question(item, whole) for item in sheet.items if item.candidates]
    if not rows:
        raise ConfigError("metadata.items", items, f"holds no items of {recall}")
    return {"test": Dataset.from_list(rows)}


def _question(item: Item, whole: str) -> dict[str, Any]:
    """An item as the harness has it.

    Candidates may become one token with the characters before them, each with others. So the word
    before them, if they begin in one, is a part of each.
    """
    head = whole[: item.place] + item.before
    word = LAST_WORD.findall(head[-LONGEST_WORD:])[0]
    return {
        "context": head[: len(head) - len(word)],
        "choices": [word + candidate + item.after for candidate in item.candidates],
        "answer": item.answer,
        "distance": item.distance,
    }
