"""How facts are written in the syntax of a corpus, and names that no text holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

SAMPLE = 20_000
"""Characters of a document that its syntax is recognised by."""


@dataclass(frozen=True)
class Syntax:
    """One syntax."""

    name: str
    signs: re.Pattern[str]
    """What occurs in such a document, and hardly in others."""
    fact: tuple[str, str]
    """What stands before and after the value of a fact; ``{name}`` in the first part."""
    reference: str
    """What stands for the value of the fact ``{name}`` in another fact."""
    function: str
    """The definition of a function of two arguments, ``{name}``."""
    call: tuple[str, str]
    """What stands before and after the two arguments of a call; ``{name}`` in the first part."""
    comma: str
    """What stands between the arguments."""


SYNTAXES = (
    Syntax(
        "latex",
        re.compile(r"\\(?:begin|label|ref|section)\{"),
        (r"\newcommand{{\{name}}}{{", "}\n"),
        "\\{name}",
        "\\newcommand{{\\{name}}}[2]{{#1 \\to #2}}\n",
        ("$\\{name}{{", "}$\n"),
        "}{",
    ),
    Syntax(
        "isabelle",
        re.compile(r"\\<[A-Za-z]+>|\b(?:lemma|theory|by \()"),
        ('abbreviation "{name} \\<equiv> ', '"\n'),
        "{name}",
        'definition "{name} x y = f x y"\n',
        ('term "{name} ', '"\n'),
        " ",
    ),
    Syntax(
        "code",
        re.compile(r"^\s*(?:def|class|import|from|fn|func|static|return)\b|[;{]\r?$", re.M),
        ("{name} = ", "\n"),
        "{name}",
        "def {name}(first, second):\n    return first.join(second)\n",
        ("{name}(", ")\n"),
        ", ",
    ),
    Syntax(
        "prose",
        re.compile(r"(?!)"),
        ("The number of {name} is ", ".\n"),
        "the number of {name}",
        "Whoever calls {name} brings two things.\n",
        ("They called {name} with ", ".\n"),
        " and ",
    ),
)
"""In order of recognition; the last one fits where no other does."""


def syntax_of(text: str) -> Syntax:
    """The syntax of a document: the first one with a sign in at least one of 500 characters."""
    sample = text[:SAMPLE]
    for syntax in SYNTAXES[:-1]:
        signs = sum(1 for _ in syntax.signs.finditer(sample))
        if signs and signs * 500 >= len(sample):
            return syntax
    return SYNTAXES[-1]


def new_names(text: str, random: Random) -> Iterator[str]:
    """Names of six letters that do not occur in a text, none twice."""
    used: set[str] = set()
    while True:
        name = "".join(random.choice(letters) for letters in ("bdfgkmprtvz", "aeiou") * 3)
        if name not in used and name not in text:
            used.add(name)
            yield name


def new_values(text: str, random: Random, count: int) -> list[str]:
    """Numbers of equally many digits that do not occur in a text, none twice: of four digits, or
    of more where the text holds too many of those."""
    least = 1000
    numbers = [*range(least, 10 * least)]
    random.shuffle(numbers)
    while True:
        new = (str(number) for number in numbers if str(number) not in text)
        found = [*islice(new, count)]
        if len(found) == count:
            return found
        least *= 100
        numbers = random.sample(range(least, 10 * least), len(numbers))
