"""Variable tracking: what one lookup cannot do."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

from .continuations import tokens_before, tokens_up_to
from .filler import LEAD, SPARE, TOO_SHORT, Filler
from .items import Item, Sheet
from .syntax import new_names, new_values, syntax_of
from .task import Settings, Task
from .texts import Texts

HOPS = (0, 1, 2, 3)
CHAINS = 4
"""Chains of a text; each ends in a value of its own."""


class VariableTracking(Task):
    """What is the value of the last variable of a chain?"""

    name = "variables"
    title = "Variable tracking"
    axis = "hops to the value"
    shows = (
        "Four chains of facts: a name has a number, and each further name has the value of the one "
        "before. The number of the last name is chosen among the four numbers. A memory that is "
        "looked up once finds 0 hops."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Chains of each number of hops."""
        count = max(1, settings.questions // (CHAINS * len(HOPS)))
        filler = Filler(texts, random)
        sheets = []
        for hops in HOPS:
            for _ in range(count):
                sheet = self._sheet(hops, filler, settings, random)
                if sheet is None:
                    skipped[TOO_SHORT] += 1
                else:
                    sheets.append(sheet)
        return sheets

    def _sheet(self, hops: int, filler: Filler, settings: Settings, random: Random) -> Sheet | None:
        distance = settings.min_distance
        drawn = filler.draw(LEAD + distance + SPARE)
        if drawn is None:
            return None
        text, first = drawn
        whole = text.tokens.text
        syntax = syntax_of(whole)
        before, after = syntax.fact
        made_up = new_names(whole, random)
        names = [[*islice(made_up, CHAINS)] for _ in range(hops + 1)]
        values = new_values(whole, random, CHAINS)
        lines: list[str] = []
        last: dict[int, int] = {}
        for hop, own in enumerate(names):
            for chain in random.sample(range(CHAINS), CHAINS):
                last[chain] = len(lines)
                value = values[chain]
                if hop:
                    value = syntax.reference.format(name=names[hop - 1][chain])
                lines.append(f"{before.format(name=own[chain])}{value}{after}")
        lines[0] = f"\n{lines[0]}"
        written = filler.write(text, first, [LEAD, *lines, distance + SPARE])
        place = written.after(len(lines) - 1, distance)
        if place is None:
            return None
        items = []
        for chain in range(CHAINS):
            choices = [*values]
            random.shuffle(choices)
            spoken = tokens_up_to(written.tokens, written.ends[last[chain]])
            items.append(
                Item(
                    place=place,
                    x=hops,
                    distance=tokens_before(written.tokens, place) - spoken,
                    chance=1 / CHAINS,
                    candidates=tuple(choices),
                    answer=choices.index(values[chain]),
                    before="\n" + before.format(name=names[-1][chain]),
                    after=after,
                )
            )
        return Sheet(written.pieces, tuple(items))
