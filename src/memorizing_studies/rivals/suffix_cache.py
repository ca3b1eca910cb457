"""A suffix cache on top of a finished model: no weights, nothing trained.

For each token it looks for the last tokens earlier in the document, and mixes what followed there
into the model's prediction: ``p = (1 - l) p_model + l p_cache``. ``l`` depends on the longest match
alone and is estimated online, from the tokens before, by expectation-maximisation. So the mixture
sums to 1 and knows nothing of the future. The idea is that of the continuous cache (Grave et al.,
2017), with exact matches instead of hidden states.

A model's own probability of the token that came suffices, so it reads what ``predict`` wrote.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memorizing_transformers.errors import ConfigError

ORDERS = (8, 4, 2)
"""Lengths of the suffixes that are looked up, in tokens."""
PER_ORDER = 8
"""Latest occurrences that are looked at for each length."""
LONGEST = 24
"""Length from which matches count alike."""
PRIOR = (0.5, 5.0)
"""A weight ``l`` begins as if the cache had been right in 0.5 of 5 tokens."""


@dataclass
class SuffixCache:
    """What a document's text so far says of its next token.

    Args:
        window: tokens back to which occurrences count.
    """

    window: int
    tokens: list[int] = field(default_factory=list)
    _places: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    _weights: dict[int, list[float]] = field(default_factory=dict)

    def forecast(self) -> tuple[int, dict[int, float]]:
        """The longest match, 0 for none, and the probabilities of the tokens that followed."""
        text, here, lengths = self.tokens, len(self.tokens), {}
        for order in ORDERS:
            if here < order:
                continue
            for place in self._places.get(tuple(text[-order:]), ())[-PER_ORDER:]:
                if place < here - self.window or place in lengths:
                    continue
                length, longest = order, min(LONGEST, place)
                while length < longest and text[place - 1 - length] == text[-1 - length]:
                    length += 1
                lengths[place] = length
        total = sum(2.0**length for length in lengths.values())
        shares: dict[int, float] = defaultdict(float)
        for place, length in lengths.items():
            shares[text[place]] += 2.0**length / total
        return max(lengths.values(), default=0), shares

    def weight(self, length: int) -> float:
        """The cache's weight ``l`` where the longest match is ``length``."""
        right, count = self._weights.get(length, PRIOR)
        return right / count

    def read(self, token: int, probability: float) -> float:
        """Take the next token, and return the mixture's probability of it.

        Args:
            token: the token.
            probability: the model's own of it.
        """
        length, shares = self.forecast()
        mixed = probability
        if length:
            weight = self.weight(length)
            mixed = (1 - weight) * probability + weight * shares.get(token, 0.0)
            counts = self._weights.setdefault(length, [*PRIOR])
            counts[0] += weight * shares.get(token, 0.0) / mixed if mixed else 0.0
            counts[1] += 1
        for order in ORDERS:
            if len(self.tokens) >= order:
                self._places[tuple(self.tokens[-order:])].append(len(self.tokens))
        self.tokens.append(token)
        return mixed


def mixed_losses(tokens: Sequence[int], losses: Sequence[float], window: int) -> list[float]:
    """Losses of a document in nats with a suffix cache.

    Args:
        tokens: its predicted tokens, in order.
        losses: the model's loss of each.
        window: tokens back to which occurrences count.
    """
    cache = SuffixCache(window)
    return [
        -math.log(cache.read(token, math.exp(-loss)))
        for token, loss in zip(tokens, losses, strict=True)
    ]


def documents(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and losses of each document of a file of predictions, or of a folder of such parts.

    Raises:
        ConfigError: where it is no such file.
    """
    try:
        table = pq.read_table(path, columns=["document", "position", "token", "loss"])
    except (OSError, ValueError) as error:
        remedy = "is no predictions.parquet that `python train.py predict` wrote"
        raise ConfigError("predictions", str(path), remedy) from error
    rows: list[dict[str, Any]] = table.to_pylist()
    rows.sort(key=lambda row: row["position"])
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        tokens, losses = found.setdefault(str(row["document"]), ([], []))
        tokens += row["token"]
        losses += row["loss"]
    return found


def suffix_cache(predictions: str, window: int | None = None) -> None:
    """Print the perplexity of each document with and without the cache, and of all."""
    if window is not None and window < 1:
        raise ConfigError("window", window, "must be at least 1")
    table = Table(title="A suffix cache on top of the model")
    for heading in ("document", "tokens", "model", "with suffix cache"):
        table.add_column(heading, justify="left" if heading == "document" else "right")
    own, mixed, count = 0.0, 0.0, 0
    known = documents(Path(predictions))
    for name, (tokens, losses) in track(known.items(), "documents", transient=True):
        with_cache = sum(mixed_losses(tokens, losses, window or len(tokens)))
        row = [f"{math.exp(x / len(tokens)):.3f}" for x in (sum(losses), with_cache)]
        table.add_row(name, f"{len(tokens):,}", *row)
        own, mixed, count = own + sum(losses), mixed + with_cache, count + len(tokens)
    table.add_section()
    table.add_row("all", f"{count:,}", *(f"{math.exp(x / count):.3f}" for x in (own, mixed)))
    Console().print(table)
