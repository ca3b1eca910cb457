"""Key-token perplexity: of the tokens that a reference model predicts by what lies far back.

After LongPPL (Fang et al., 2024), with a memory in the place of a long context.

Shapes: L tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from .continuations import Encoder, start_of
from .items import Item, Sheet
from .scoring import Arm, note_losses, refuse_no_number
from .task import Settings, Task, drawn_evenly
from .texts import Texts

GAIN = 2.0
"""Nats that a key token gains by the reference model's memory, at least."""
LOSS = 2.0
"""Nats that it then costs, at most."""
PER_QUESTION = 10
"""Tokens that are scored for each question of other tasks."""


def losses_of(arm: Arm, encoder: Encoder, text: str) -> tuple[NDArray[np.float64], NDArray]:
    """The loss (L,) of each token of a text in nats, and where each token ends in characters.

    Raises:
        UserError: where the model's logits are not finite.
    """
    tokens = encoder.text(text)
    session, begin = arm.session(), 0
    losses = np.zeros((2, len(tokens)))
    ids = torch.from_numpy(tokens.ids)[None].to(next(arm.model.parameters()).device)
    for part, output in session.parts(ids):
        assert output.logits is not None
        note_losses(losses, output.logits[0], ids[0], begin)
        begin += part.shape[1]
    refuse_no_number(arm, losses[0])
    return losses[0], tokens.ends


class KeyTokens(Task):
    """The perplexity of tokens that need what lies far back."""

    name = "key-tokens"
    title = "Key-token perplexity"
    axis = "position in the document, tokens of the reference model (lower edge)"
    measure = "nats"
    shows = (
        "Tokens that gain more than 2 nats by the memory of the reference model, and then cost "
        "less than 2. The reference model is the same for all models that are compared."
    )

    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """Key tokens of all documents."""
        reference = texts.reference
        if reference is None:
            skipped["no reference model was given"] += 1
            return []
        encoder = Encoder(reference.model.tokenizer)
        found: list[tuple[str, Item]] = []
        for text in texts.texts:
            content = text.tokens.text
            on, ends = losses_of(reference, encoder, content)
            off, _ = losses_of(replace(reference, size=0), encoder, content)
            key = (off - on > GAIN) & (on < LOSS) & (np.diff(ends, prepend=0) > 0)
            key[: settings.min_distance] = False
            skipped["no token gains by the reference's memory"] += not key.any()
            tokens = encoder.text(content)
            for index in np.flatnonzero(key).tolist():
                place, end = start_of(tokens, index), int(ends[index])
                x = settings.edge(index)
                found.append((text.name, Item(place=place, end=end, x=x, distance=0, chance=0.0)))
        most = PER_QUESTION * settings.questions
        kept = drawn_evenly(found, lambda one: one[1].x, most, random)
        return [
            Sheet(text.pieces, items)
            for text in texts.texts
            if (items := tuple(item for name, item in kept if name == text.name))
        ]
