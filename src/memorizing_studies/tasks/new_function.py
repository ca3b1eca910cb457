"""A new function in context: does the model learn from its uses how it is called?"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

from .continuations import tokens_before, tokens_up_to
from .filler import LEAD, TOO_SHORT, Filler
from .items import Item, Sheet
from .syntax import new_names, syntax_of
from .task import Settings, Task
from .texts import Texts

USES = 8
"""Uses of a function."""
ASKED = (1, 2, 4, 8)
"""The uses that are asked for."""
CHOICES = 4


class NewFunction(Task):
    """With what arguments is a new function called?"""

    name = "new-function"
    title = "A new function in context"
    axis = "number of the use"
    measure = "nats"
    shows = (
        "A made-up function is defined and then called 8 times with the same two arguments. At "
        "the 1st, 2nd, 4th and 8th call the arguments are asked for; at the 1st nobody can know "
        "them. The others to choose from are made up too."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Functions whose uses are near and far apart."""
        gaps = [gap for gap in (1, 4) if USES * gap * settings.min_distance < settings.max_tokens]
        count = max(1, settings.questions // (len(ASKED) * max(1, len(gaps))))
        filler = Filler(texts, random)
        sheets = []
        for gap in (gap * settings.min_distance for gap in gaps):
            for _ in range(count):
                sheet = self._sheet(gap, filler, settings, random)
                if sheet is None:
                    skipped[TOO_SHORT] += 1
                else:
                    sheets.append(sheet)
        skipped[TOO_SHORT] += not gaps
        return sheets

    def _sheet(self, gap: int, filler: Filler, settings: Settings, random: Random) -> Sheet | None:
        drawn = filler.draw(LEAD + USES * gap)
        if drawn is None:
            return None
        text, first = drawn
        whole = text.tokens.text
        syntax = syntax_of(whole)
        made_up = new_names(whole, random)
        name = next(made_up)
        pairs = [syntax.comma.join(islice(made_up, 2)) for _ in range(CHOICES)]
        begin, end = syntax.call
        begin = "\n" + begin.format(name=name)
        parts: list[str | int] = [LEAD, "\n" + syntax.function.format(name=name)]
        for _ in range(USES):
            parts += [gap, f"{begin}{pairs[0]}{end}"]
        written = filler.write(text, first, parts)
        items = []
        for use in ASKED:
            place = written.begins[use]  # fact 0 is the definition
            spoken = tokens_up_to(written.tokens, written.ends[use - 1])
            choices = [*pairs]
            random.shuffle(choices)
            items.append(
                Item(
                    place=place,
                    x=use,
                    distance=tokens_before(written.tokens, place) - spoken,
                    chance=1 / CHOICES,
                    group=f"{gap:,} tokens apart",
                    candidates=tuple(choices),
                    answer=choices.index(pairs[0]),
                    before=begin,
                    after=end,
                )
            )
        return Sheet(written.pieces, tuple(items))
