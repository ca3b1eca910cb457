"""Recall of facts that are written into real text: keys, their values, their latest values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from random import Random

from .filler import LEAD, SPARE, TOO_SHORT, Filler
from .items import Item, Sheet
from .syntax import new_names, new_values, syntax_of
from .task import Settings, Task
from .texts import Texts

KEYS = (1, 4, 16, 64)
"""Facts of a text."""
CHANGED = (1, 4, 16)
"""Facts of a text whose values all change once."""
ASKED = 4
"""Facts of a text that are asked for, at most."""
CHOICES = 4
"""Values to choose from, at least; where fewer were written, others are made up."""


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
        longest = max((len(text.tokens) for text in texts.texts), default=0)
        places = [one for one in distances(settings) if LEAD + one + SPARE <= longest]
        if not places:
            skipped[TOO_SHORT] += 1
            return []
        per_cell = max(1, settings.questions // (len(PLANS) * len(places)))
        filler = Filler(texts, random)
        sheets = []
        for plan in PLANS:
            for _ in range(-(-per_cell // min(plan.keys, ASKED))):
                sheet = self._sheet(plan, places, filler, random)
                if sheet is None:
                    skipped[TOO_SHORT] += 1
                else:
                    sheets.append(sheet)
        return sheets

    def _sheet(self, plan: Plan, places: list[int], filler: Filler, random: Random) -> Sheet | None:
        drawn = filler.draw(LEAD + places[-1] + SPARE)
        if drawn is None:
            return None
        text, first = drawn
        whole = text.tokens.text
        before, after = syntax_of(whole).fact
        names = [*islice(new_names(whole, random), plan.keys)]
        rounds = 2 if plan.changed else 1
        values = new_values(whole, random, max(CHOICES, rounds * plan.keys))
        lines = [
            f"{before.format(name=names[number % plan.keys])}{value}{after}"
            for number, value in enumerate(values[: rounds * plan.keys])
        ]
        lines[0] = f"\n{lines[0]}"
        written = filler.write(text, first, [LEAD, *lines, places[-1] + SPARE])
        items = []
        for key in random.sample(range(plan.keys), min(ASKED, plan.keys)):
            number = len(lines) - plan.keys + key
            for distance in places:
                place = written.after(number, distance)
                if place is None or place < written.ends[-1]:
                    continue  # not before all facts were written
                choices = [*values]
                random.shuffle(choices)
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
                        rivals={"most recent": float(number == len(lines) - 1)},
                    )
                )
        return Sheet(written.pieces, tuple(items)) if items else None
