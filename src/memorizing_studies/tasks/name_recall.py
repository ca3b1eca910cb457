"""Recall of names: labels of LaTeX, functions and classes of code, lemmas of Isabelle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from .continuations import tokens_before, tokens_up_to
from .items import Item, Sheet
from .syntax import syntax_of
from .task import Settings, Task, drawn_evenly
from .texts import Text, Texts

AROUND = 200
"""Characters of the line before a name that are looked at."""


@dataclass(frozen=True)
class Naming:
    """How names are defined and used in one syntax. Each pattern takes time linear in the text."""

    name: re.Pattern[str]
    """A complete name, wherever it is mentioned."""
    defined_after: re.Pattern[str]
    """The end of the line before a name that is defined."""
    used_after: re.Pattern[str]
    """The end of the line before a name that is asked for."""
    used_before: str
    """The characters one of which follows a name that is asked for."""
    kind: Callable[[str], str] = lambda name: ""
    """Candidates are of the same kind."""
    no_names: frozenset[str] = frozenset()
    """Words that are no names."""


LABELS = Naming(
    name=re.compile(r"(?<=\{)[^{}\s]{1,100}(?=\})"),
    defined_after=re.compile(r"\\label\{$"),
    used_after=re.compile(r"\\(?:eq|page|auto|c|C|v|name)?ref\{$"),
    used_before="}",
    kind=lambda name: re.split("[-:]", name)[0],
)
FUNCTIONS = Naming(
    name=re.compile(r"[^\W\d]\w{2,99}(?!\w)"),
    defined_after=re.compile(r"\b(?:def|class|fn|func|function)\s+$"),
    used_after=re.compile(r"(?:^|\W)$"),
    used_before="(",
)
LEMMAS = Naming(
    name=re.compile(r"[^\W\d][\w'.]{1,99}(?![\w'])"),
    defined_after=re.compile(
        r"\b(?:lemma|theorem|corollary|proposition|lemmas)\s+(?:\(in \w+\)\s*)?$"
    ),
    used_after=re.compile(
        r"\b(?:add|simp|intro|dest|elim|subst|rule|metis|blast|fact|OF|THEN|using|unfolding|from)\b"
        r"[^\"]*\s$"
    ),
    used_before=")]\n\r",
    no_names=frozenset({"assumes", "constrains", "defines", "fixes", "notes", "obtains", "shows"}),
)


@dataclass
class Kind:
    """What is known of the names of one kind so far."""

    names: list[str] = field(default_factory=list)
    """In the order of their definitions."""
    mentions: Counter[str] = field(default_factory=Counter)
    last: str = ""
    """The name that was mentioned last."""
    most: str = ""
    """The name that was mentioned most often."""

    def mention(self, name: str) -> None:
        """Count a mention."""
        self.mentions[name] += 1
        self.last = name
        if self.mentions[name] >= self.mentions[self.most]:
            self.most = name


@dataclass(frozen=True)
class Use:
    """A use of a name that was defined before."""

    text: Text
    name: str
    place: int
    """Where it begins, in characters."""
    last_end: int
    """Where the last mention before ends."""
    kind: Kind
    count: int
    """Names of the kind that were defined before."""
    latest: str
    most: str
    distance: int = 0
    """Tokens between."""


def uses(text: Text, naming: Naming) -> Iterator[Use]:
    """The uses of defined names in a document, in order."""
    content = text.tokens.text
    kinds: dict[str, Kind] = {}
    ends: dict[str, int] = {}
    """By defined name the end of its last mention."""
    for match in naming.name.finditer(content):
        name, place = match[0], match.start()
        if name in naming.no_names:
            continue
        begin = content.rfind("\n", max(0, place - AROUND), place) + 1 or max(0, place - AROUND)
        line = content[begin:place]
        defined = bool(naming.defined_after.search(line))
        if name in ends:
            kind = kinds[naming.kind(name)]
            follows = content[match.end() : match.end() + 1]
            asked = follows and follows in naming.used_before and naming.used_after.search(line)
            if asked and not defined and len(kind.names) > 1:
                known = (kind, len(kind.names), kind.last, kind.most)
                yield Use(text, name, place, ends[name], *known)
        elif defined:
            kind = kinds.setdefault(naming.kind(name), Kind())
            kind.names.append(name)
        else:
            continue
        ends[name] = match.end()
        kind.mention(name)


class NameRecall(Task):
    """Which of the names that were defined so far is used here?"""

    axis = "tokens since the name was last mentioned"
    naming: ClassVar[Naming]
    lacks: ClassVar[str]
    """The reason why a document is skipped."""
    syntax: ClassVar[str | None] = None
    """Documents of another syntax are skipped; None for none."""

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Uses of names at all distances, from all documents."""
        found = []
        for text in texts.texts:
            fits = self.syntax in (None, syntax_of(text.tokens.text).name)
            own = [*uses(text, self.naming)] if fits else []
            skipped[self.lacks] += not own
            far = [use for use in map(measured, own) if use.distance >= settings.min_distance]
            skipped["no name comes back from far enough"] += bool(own) and not far
            found += far
        kept = drawn_evenly(
            found, lambda use: settings.edge(use.distance), settings.questions, random
        )
        items: dict[str, list[Item]] = {}
        for use in kept:
            items.setdefault(use.text.name, []).append(asked(use, settings, random))
        pieces = {text.name: text.pieces for text in texts.texts}
        return [Sheet(pieces[name], tuple(own)) for name, own in items.items()]


def measured(use: Use) -> Use:
    """The same with its distance in tokens."""
    tokens = use.text.tokens
    between = tokens_before(tokens, use.place) - tokens_up_to(tokens, use.last_end)
    return Use(**{**vars(use), "distance": between})


def asked(use: Use, settings: Settings, random: Random) -> Item:
    """The question which name is used."""
    names = use.kind.names[: use.count]
    if len(names) > settings.candidates:
        always = {use.name, use.latest, use.most}
        others = [name for name in names if name not in always]
        kept = {*random.sample(others, max(0, settings.candidates - len(always))), *always}
        names = [name for name in names if name in kept]
    content = use.text.tokens.text
    end = use.place + len(use.name)
    return Item(
        place=use.place,
        x=settings.edge(use.distance),
        distance=use.distance,
        chance=1 / len(names),
        candidates=tuple(names),
        answer=names.index(use.name),
        after=content[end : end + 1],
        rivals={
            "most recent": float(use.latest == use.name),
            "most frequent": float(use.most == use.name),
        },
    )


class LabelRecall(NameRecall):
    """Labels of LaTeX."""

    name = "label-recall"
    title = "Label recall (LaTeX)"
    shows = (
        "At each \\ref, the label that stands there is ranked among all labels of its kind that "
        "were defined before."
    )
    naming = LABELS
    lacks = "no label is cited"


class IdentifierRecall(NameRecall):
    """Functions and classes of code."""

    name = "identifier-recall"
    title = "Identifier recall (code)"
    shows = (
        "At each call, the name that is called is ranked among all functions and classes that were "
        "defined before."
    )
    naming = FUNCTIONS
    lacks = "no function is called"


class LemmaRecall(NameRecall):
    """Lemmas of Isabelle."""

    name = "lemma-recall"
    title = "Lemma recall (Isabelle)"
    shows = "In a proof, the lemma that is used is ranked among all lemmas that were stated before."
    naming = LEMMAS
    lacks = "no lemma is used"
    syntax = "isabelle"  # LaTeX has lemmas too
