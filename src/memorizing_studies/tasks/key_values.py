"""Recall of facts that are written into real text: keys, their values, their latest values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from random import Random

from .continuations import Encoder, start_of, tokens_up_to
from .items import Item, Piece, Sheet
from .syntax import new_names, new_values, syntax_of
from .task import Settings, Task
from .texts import Text, Texts

KEYS = (1, 4, 16, 64)
"""Facts of a text."""
CHANGED = (1, 4, 16)
"""Facts of a text whose values all change once."""
ASKED = 4
"""Facts of a text that are asked for, at most."""
CHOICES = 4
"""Values to choose from, at least; where fewer were written, others are made up."""
LEAD = 32
"""Tokens of real text before the facts."""
SPARE = 8
"""Tokens more than needed; where facts meet real text, tokens can change."""


@dataclass(frozen=True)
class Plan:
    """One text with facts."""

    keys: int
    changed: bool
    """Whether each fact is written a second time with another value."""

    @property
    def group(self) -> str:
        """Its name."""
        keys = f"{self.keys} key{'s' if self.keys > 1 else ''}"
        return f"{keys}, latest of 2 values" if self.changed else keys


PLANS = [
    *(Plan(keys, False) for keys in KEYS),
    *(Plan(keys, True) for keys in CHANGED),
]


def distances(settings: Settings) -> list[int]:
    """The distances that are asked at, in tokens: each four times the one before."""
    found = [settings.min_distance]
    while found[-1] * 4 <= settings.max_tokens // 2:
        found.append(found[-1] * 4)
    return found


class Filler:
    """Parts of documents, drawn at random, that facts are written into.

    Args:
        texts: the documents.
        random: what draws.
    """

    def __init__(self, texts: Texts, random: Random) -> None:
        self.texts, self.random = texts, random
        self.encoder: Encoder | None = None

    def draw(self, tokens: int) -> tuple[Text, int] | None:
        """A document and one of its tokens that begins a line, with ``tokens`` tokens after it.

        None where no document is as long.
        """
        fit = [text for text in self.texts.texts if len(text.tokens) > tokens]
        if not fit:
            return None
        text = self.random.choice(fit)
        first = self.random.randrange(len(text.tokens) - tokens)
        begin = text.tokens.text.rfind("\n", 0, start_of(text.tokens, first) + 1) + 1
        return text, tokens_up_to(text.tokens, begin)

    def encode(self, pieces: tuple[Piece, ...]) -> tuple[str, Encoder]:
        """The text of pieces, and the encoder of the documents' tokenizer."""
        if self.encoder is None:
            self.encoder = Encoder(self.texts.texts[0].tokenizer)
        return self.texts.join(pieces), self.encoder


class KeyValues(Task):
    """What is the value of a key that was written far back?"""

    name = "key-values"
    title = "Key-value recall"
    axis = "tokens since the fact was written"
    shows = (
        "Facts (a name and a number, in the syntax of the corpus) are written into real text. "
        "The right number is chosen among all that were written. Where values changed, the latest "
        "one is right."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Texts with few and many facts, each asked for at several distances."""
        places = distances(settings)
        per_cell = max(1, settings.questions // (len(PLANS) * len(places)))
        filler = Filler(texts, random)
        sheets = []
        for plan in PLANS:
            for _ in range(-(-per_cell // min(plan.keys, ASKED))):
                sheet = self._sheet(plan, places, filler, random)
                if sheet is None:
                    skipped["no document is long enough for a text with facts"] += 1
                else:
                    sheets.append(sheet)
        return sheets

    def _sheet(self, plan: Plan, places: list[int], filler: Filler, random: Random) -> Sheet | None:
        length = LEAD + places[-1] + SPARE
        drawn = filler.draw(length)
        if drawn is None:
            return None
        text, first = drawn
        tokens = text.tokens
        last = min(len(tokens), first + length)
        whole = tokens.text
        syntax = syntax_of(whole)
        before, after = syntax.fact
        names = [*islice(new_names(whole, random), plan.keys)]
        rounds = 2 if plan.changed else 1
        values = [*islice(new_values(whole, random), max(CHOICES, rounds * plan.keys))]
        written = values[: rounds * plan.keys]
        lines = [
            f"{before.format(name=names[number % plan.keys])}{value}{after}"
            for number, value in enumerate(written)
        ]
        lead = text.part(first, first + LEAD)
        facts = "\n" + "".join(lines)
        pieces = (lead, Piece(text=facts), text.part(first + LEAD, last))
        content, encoder = filler.encode(pieces)
        read = encoder.text(content)
        ends, end = [], lead.end - lead.begin + 1
        for line in lines:
            end += len(line)
            ends.append(end)
        items = []
        for key in random.sample(range(plan.keys), min(ASKED, plan.keys)):
            number = len(lines) - plan.keys + key
            spoken = tokens_up_to(read, ends[number])
            for distance in places:
                place = start_of(read, min(len(read), spoken + distance))
                # Not before all facts were written, and not where a token ends in a character.
                if place < ends[-1] or tokens_up_to(read, place) != spoken + distance:
                    continue
                choices = [*values]
                random.shuffle(choices)
                rivals = {"most recent": float(values[number] == written[-1])}
                items.append(
                    Item(
                        place=place,
                        x=distance,
                        distance=distance,
                        chance=1 / len(choices),
                        group=plan.group,
                        candidates=tuple(choices),
                        answer=choices.index(values[number]),
                        before="\n" + before.format(name=names[key]),
                        after=after,
                        rivals=rivals,
                    )
                )
        return Sheet(pieces, tuple(items)) if items else None
