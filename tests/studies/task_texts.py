"""Documents for the tests of tasks: names, facts and copies that come back from known places."""

from __future__ import annotations

import random
from typing import Any

from memorizing_studies.tasks.task import Settings
from memorizing_studies.tasks.texts import Text, Texts
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, train_bpe

SETTINGS = Settings(seed=0, questions=24, candidates=128, min_distance=64, max_tokens=4096)
WORDS = ["every", "point", "lies", "near", "some", "line", "each", "small", "set", "holds", "more"]


def prose(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)) + ".\n"


def latex(seed: int = 0, labels: int = 8) -> str:
    """Lemmas that are cited again, with prose of 3 to 60 words between."""
    draw = random.Random(seed)
    names = [f"lemma-{draw.choice(WORDS)}-{number}" for number in range(labels)]
    parts = ["\\section{Sets}\n"]
    for name in names:
        parts.append(f"\\begin{{lemma}}\n\\label{{{name}}}\n{prose(draw, 20)}\\end{{lemma}}\n")
    for _ in range(5 * labels):
        parts.append(prose(draw, draw.choice([3, 20, 60])))
        parts.append(f"By Lemma \\ref{{{draw.choice(names)}}} we are done.\n")
    return "".join(parts)


def code(seed: int = 0) -> str:
    """Functions that are called again."""
    draw = random.Random(seed)
    names = [f"make_{draw.choice(WORDS)}_{number}" for number in range(8)]
    parts = [f"def {name}(value):\n    return value  # {prose(draw, 9)}\n" for name in names]
    for number in range(40):
        parts.append(f"x{number} = {draw.choice(names)}({number})  # {prose(draw, 20)}")
    return "".join(parts)


def isabelle(seed: int = 0) -> str:
    """Lemmas that proofs use."""
    draw = random.Random(seed)
    names = [f"{draw.choice(WORDS)}_{number}" for number in range(8)]
    parts = [f'lemma {name}: "a = b"\n  by simp\n' for name in names]
    for number in range(30):
        parts.append(f'(* {prose(draw, 20)} *)\nlemma step{number}:\n  assumes "x = y"\n')
        parts.append(f"  by (simp add: {draw.choice(names)})\n")
    return "".join(parts)


def texts_of(*contents: str, tokenizer: Any = None, most: int = 4096) -> Texts:
    """Documents ``document 0`` and so on."""
    tokenizer = tokenizer or byte_tokenizer()
    return Texts([Text(f"document {n}", text, tokenizer, most) for n, text in enumerate(contents)])


def bpe() -> Any:
    """A tokenizer whose tokens hold several characters, and blanks with what follows them."""
    return train_bpe([latex(9), code(9), isabelle(9), "Füße ✓ 123 4567 = "], 400)
