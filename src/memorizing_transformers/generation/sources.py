"""Where generated tokens came from: the passages that were retrieved, and what was copied.

Shapes: H query heads, N tokens, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory import Readable
from ..model import ModelOutput
from ..model.reader import Retrieval, Shelf
from .remembered import Passage
from .session import Session

AROUND = 8
"""Tokens shown before and after a retrieved one."""


Place = tuple[bool, int]
"""Whether a position is one of a library, and the position."""


@dataclass(frozen=True)
class Source:
    """A passage that a token was predicted from."""

    document: str
    """Its name; empty for the text that follows the documents."""
    position: int
    """Of the retrieved token in its document."""
    text: str
    """The tokens around it."""
    weight: float
    """Its share of the outputs of the memory layers, of 1 for all heads of all layers."""


@dataclass(frozen=True)
class Origin:
    """What a memory gave to the prediction of one token."""

    sources: list[Source]
    """The weightiest first."""
    memory: float
    """Share of the memory layers' outputs that came from the memory."""
    copied: float | None
    """Weight of the copy head in the prediction; None without one."""
    repeated: Source | None = None
    """Where the last tokens occurred before, and what followed; only with copies of repeats. Its
    weight is that of all copies."""


class Sources:
    """An observer of a session of one row that keeps where its predictions came from.

    Args:
        passages: what the memory holds of documents.
        tokenizer: to decode tokens with.
        most: sources that are kept of each token.
    """

    def __init__(self, passages: Sequence[Passage], tokenizer: Any, most: int = 3) -> None:
        self.passages, self.tokenizer, self.most = [*passages], tokenizer, most
        self.origins: list[Origin] = []
        """By token that was read: where the prediction of the next one came from."""

    def __call__(self, session: Session, input_ids: Tensor, output: ModelOutput) -> None:
        """Look at a part before its pairs are written."""
        count = input_ids.shape[1]
        weights: list[dict[Place, float]] = [{} for _ in range(count)]
        slots: list[dict[Place, tuple[Readable, int]]] = [{} for _ in range(count)]
        shares = torch.zeros(count)
        layers = max(1, len(output.retrievals))
        for layer, found in output.retrievals.items():
            memory = session.bank.memories[layer]
            heads = found.share.shape[1]
            shares += found.share[0].float().mean(0).cpu() / layers
            whole: list[tuple[Readable, Retrieval | Shelf]] = [(memory, found)]
            if found.library is not None:
                whole.append((memory.library, found.library))
            for store, part in whole:
                valid = part.valid[0].cpu()
                weight = part.weights[0].float().cpu() * found.share[0].float().cpu()[..., None]
                weight = weight.masked_fill(~valid, 0.0) / (heads * layers)
                places = part.slots[0].cpu().masked_fill(~valid, 0)
                positions = _positions(store, places)
                for token in range(count):
                    flat = weight[:, token].flatten()
                    best = flat.topk(min(8 * self.most, len(flat)))
                    for own, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                        if own > 0:
                            position = int(positions[:, token].flatten()[index])
                            place = (store is not memory, position)
                            known = weights[token]
                            known[place] = known.get(place, 0.0) + own
                            slot = int(places[:, token].flatten()[index])
                            slots[token][place] = (store, slot)
        copied = None if output.copied is None else output.copied[0].float().tolist()
        repeats = self._repeats(session, input_ids, copied)
        for token in range(count):
            best_first = sorted(weights[token].items(), key=lambda pair: -pair[1])
            sources = [
                self._source(*slots[token][place], place, weight)
                for place, weight in best_first[: self.most]
            ]
            own_copies = None if copied is None else copied[token]
            self.origins.append(Origin(sources, float(shares[token]), own_copies, repeats[token]))

    def _repeats(
        self, session: Session, input_ids: Tensor, copied: list[float] | None
    ) -> list[Source | None]:
        """By token, the latest of the longest repetitions that the copy head may have copied."""
        count = input_ids.shape[1]
        head = getattr(session.model, "copy_head", None)
        if copied is None or head is None or "repeats" not in head.sources:
            return [None] * count
        memory = session.bank.memories[max(session.bank.memories)]
        ids = session.open.input_ids if session.open.count else input_ids
        found = head.sources["repeats"].search(ids, memory)
        lengths, distances = (x[0, -count:].tolist() for x in found.longest())
        written, first = int(memory.written[0]), ids.shape[1] - count
        sources: list[Source | None] = []
        for token in range(count):
            if not lengths[token]:
                sources.append(None)
                continue
            following = written + first + token - distances[token] + 1
            if following >= written:
                place = following - written
                around = ids[0, max(0, place - AROUND) : place + AROUND + 1]
                text = self.tokenizer.decode(around.tolist())
                sources.append(Source("", following, text, copied[token]))
                continue
            slot = (following - int(memory.origin[0])) % memory.size
            sources.append(self._source(memory, slot, (False, following), copied[token]))
        return sources

    def _source(self, memory: Readable, slot: int, place: Place, weight: float) -> Source:
        used = int(memory.used[0])
        age = (int(memory.written[0]) - int(memory.origin[0]) - 1 - slot) % memory.size
        before, after = min(AROUND, used - 1 - age), min(AROUND, age)
        around = (slot + torch.arange(-before, after + 1)) % memory.size
        ids = memory.token_ids[0].cpu()[around]
        # A passage ends where its document ends.
        passage = self.of(place)
        there = _positions(memory, around).tolist()
        same = [self.of((place[0], position)) is passage for position in there]
        text = self.tokenizer.decode(ids[torch.tensor(same)].tolist())
        name = "" if passage is None else passage.name
        where = place[1] if passage is None else passage.place(place[1])
        return Source(name, where, text, weight)

    def of(self, place: Place) -> Passage | None:
        """The passage that a position of the memory or of its library belongs to."""
        library, position = place
        for passage in self.passages:
            last = passage.first + passage.count
            if passage.library == library and passage.first <= position < last:
                return passage
        return None


def _positions(memory: Readable, slots: Tensor) -> Tensor:
    """What ``memory.positions`` holds at slots of its first row, without those of all others."""
    places = getattr(memory.base, "places", None)
    slots = slots.to(memory.device)
    if places is not None:
        return places[memory.owner(0)][slots].cpu()
    end = memory.written[0] - memory.origin[0]
    age = (end - 1 - slots) % memory.size
    return (memory.written[0] - 1 - age).clamp(min=0).cpu()
