"""Texts and bases that the tests of training and saving share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from families import tiny

from memorizing_transformers.data.tokens.tokenizers import train_bpe

WORDS = "abcd efgh ijkl mnop qrst uvwx"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a base and another base of the same shapes."""
    home = tmp_path_factory.mktemp("pretrained")
    (home / "texts").mkdir()
    draw = random.Random(0)
    for index in range(12):
        text = " ".join(draw.choice(WORDS.split()) for _ in range(40 + 10 * index))
        (home / "texts" / f"{index}.txt").write_text(text, "utf-8")
    tokenizer = train_bpe([WORDS * 4], 270)
    for name, scale, layers in (("base", 1.0, 2), ("other", 1.01, 2), ("deep", 1.0, 7)):
        model = tiny("llama", layers, vocab_size=len(tokenizer))
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)  # type: ignore[union-attr,operator]
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home
