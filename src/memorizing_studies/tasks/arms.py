"""All arms on all items: who can be asked, and the scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memorizing_transformers.data.tokens.encoding_rules import backend_of
from memorizing_transformers.data.tokens.tokenizers import fingerprint_tokenizer
from memorizing_transformers.errors import UserError

from .continuations import Encoder
from .items import Item, ItemSet, Piece
from .scoring import Arm, Score, score_items
from .texts import NO_PLACES, Texts


def check_places(arms: Sequence[Arm], items: ItemSet, texts: Texts) -> None:
    """Refuse a tokenizer that cannot tell where its tokens lie in the texts of items.

    Raises:
        UserError: naming the arm.
    """
    sheets = {sheet.pieces for own in items.tasks.values() for sheet in own}
    for arm in arms:
        if backend_of(arm.model.tokenizer) is not None:
            continue
        encoder = Encoder(arm.model.tokenizer)
        for text in map(texts.join, sheets):
            if encoder.text(text).text != text:
                raise UserError(
                    f"{arm.name}: {NO_PLACES} in these documents; give a model with a fast "
                    "tokenizer, or documents of ASCII"
                )


def cautions(arms: Sequence[Arm], items: ItemSet, min_distance: int) -> list[str]:
    """Sentences about what the figures do not show.

    Args:
        arms: what the figures are of.
        items: what was asked.
        min_distance: tokens, the shortest distance of the items.
    """
    found = []
    arm, reach = max(
        ((arm, arm.segment + arm.model.config.xl_cache) for arm in arms), key=lambda one: one[1]
    )
    if min_distance < reach:
        found.append(
            f"{arm.name} sees up to {reach:,} tokens back without a memory, in its segment and its "
            f"XL cache, and items begin at {min_distance:,}; give --min_distance {reach} to leave "
            "out what needs no memory"
        )
    parts = any(not i.candidates for own in items.tasks.values() for s in own for i in s.items)
    tokenizers = {fingerprint_tokenizer(arm.model.tokenizer) for arm in arms}
    tokenizers.add(items.settings.get("tokenizer", min(tokenizers)))
    if parts and len(tokenizers) > 1:
        found.append(
            "the tokenizers of the items and of all arms are not the same; nats and perplexity of "
            "parts are for each token of an arm's own tokenizer, so compare them only where it is "
            "the same"
        )
    return found


def score_all(
    arms: Sequence[Arm], items: ItemSet, texts: Texts
) -> dict[str, dict[str, list[Score]]]:
    """By task and arm the scores of all items; a text of several tasks is read once for all."""
    # By the pieces of a text: of each of its items the task, the number there, and itself.
    merged: dict[tuple[Piece, ...], list[tuple[str, int, Item]]] = {}
    for name, sheets in items.tasks.items():
        number = 0
        for sheet in sheets:
            for item in sheet.items:
                merged.setdefault(sheet.pieces, []).append((name, number, item))
                number += 1
    found: dict[str, dict[str, dict[int, Score]]] = {
        name: {arm.name: {} for arm in arms} for name in items.tasks
    }
    total = sum(max(max(i.place, i.end) for _, _, i in asked) for asked in merged.values())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for arm in arms:
            encoder = Encoder(arm.model.tokenizer)
            bar = progress.add_task(arm.name, total=total)
            for pieces, asked in merged.items():
                advance = partial(progress.advance, bar)
                own = [item for _, _, item in asked]
                scores = score_items(arm, encoder, texts.join(pieces), own, advance)
                for (name, number, _), score in zip(asked, scores, strict=True):
                    found[name][arm.name][number] = score
            progress.update(bar, completed=total)
    return {
        name: {arm: [of[n] for n in sorted(of)] for arm, of in by_arm.items()}
        for name, by_arm in found.items()
    }
