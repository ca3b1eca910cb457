"""Where generated tokens came from: the passages that were retrieved, and what was copied.

Shapes: H query heads, N tokens, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import ModelOutput
from .remembered import Passage
from .session import Session

AROUND = 8
"""Tokens shown before and after a retrieved one."""


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
        weights: list[dict[int, float]] = [{} for _ in range(count)]
        slots: list[dict[int, tuple[int, int]]] = [{} for _ in range(count)]
        shares = torch.zeros(count)
        layers = max(1, len(output.retrievals))
        for layer, found in output.retrievals.items():
            memory = session.bank.memories[layer]
            heads = found.share.shape[1]
            parts = found.parts()[0].float().masked_fill(~found.valid[0], 0.0).cpu()
            parts = parts / (heads * layers)
            shares += found.share[0].float().mean(0).cpu() / layers
            places = found.slots[0].cpu().masked_fill(~found.valid[0].cpu(), 0)
            positions = memory.positions[0].cpu()[places]
            for token in range(count):
                flat = parts[:, token].flatten()
                best = flat.topk(min(8 * self.most, len(flat)))
                for weight, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    if weight > 0:
                        position = int(positions[:, token].flatten()[index])
                        known = weights[token]
                        known[position] = known.get(position, 0.0) + weight
                        slots[token][position] = (layer, int(places[:, token].flatten()[index]))
        copied = None if output.copied is None else output.copied[0].float().tolist()
        repeats = self._repeats(session, input_ids, copied)
        for token in range(count):
            best_first = sorted(weights[token].items(), key=lambda pair: -pair[1])
            sources = [
                self._source(session, *slots[token][position], position, weight)
                for position, weight in best_first[: self.most]
            ]
            own = None if copied is None else copied[token]
            self.origins.append(Origin(sources, float(shares[token]), own, repeats[token]))

    def _repeats(
        self, session: Session, input_ids: Tensor, copied: list[float] | None
    ) -> list[Source | None]:
        """By token, the latest of the longest repetitions that the copy head may have copied."""
        count = input_ids.shape[1]
        head = getattr(session.model, "copy_head", None)
        if copied is None or head is None or "repeats" not in head.sources:
            return [None] * count
        layer = max(session.bank.memories)
        memory = session.bank.memories[layer]
        ids = session.open.input_ids if session.open.count else input_ids
        found = head.sources["repeats"].search(ids, memory)
        lengths, distances = (x[0, -count:].cpu() for x in (found.lengths, found.distances))
        written, first = int(memory.written[0]), ids.shape[1] - count
        sources: list[Source | None] = []
        for token in range(count):
            longest = int(lengths[token].max())
            if not longest:
                sources.append(None)
                continue
            back = int(distances[token][lengths[token] == longest].min())
            following = written + first + token - back + 1
            if following >= written:
                place = following - written
                around = ids[0, max(0, place - AROUND) : place + AROUND + 1]
                text = self.tokenizer.decode(around.tolist())
                sources.append(Source("", following, text, copied[token]))
                continue
            slot = (following - int(memory.origin[0])) % memory.size
            sources.append(self._source(session, layer, slot, following, copied[token]))
        return sources

    def _source(
        self, session: Session, layer: int, slot: int, position: int, weight: float
    ) -> Source:
        memory = session.bank.memories[layer]
        age, used = int(memory.age()[0, slot]), int(memory.used[0])
        before, after = min(AROUND, used - 1 - age), min(AROUND, age)
        around = (slot + torch.arange(-before, after + 1)) % memory.size
        ids = memory.token_ids[0].cpu()[around]
        # A passage ends where its document ends.
        there = memory.positions[0].cpu()[around]
        passage = self.of(position)
        same = [self.of(int(place)) is passage for place in there]
        text = self.tokenizer.decode(ids[torch.tensor(same)].tolist())
        name = "" if passage is None else passage.name
        where = position if passage is None else passage.place(position)
        return Source(name, where, text, weight)

    def of(self, position: int) -> Passage | None:
        """The passage that a position of the memory belongs to."""
        for passage in self.passages:
            if passage.first <= position < passage.first + passage.count:
                return passage
        return None
