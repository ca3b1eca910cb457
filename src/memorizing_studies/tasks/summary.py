"""From the scores of items to rows of a table: means, intervals, paired differences.

Shapes: I items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from .items import Item
from .scoring import Score

LEVEL = 0.95
"""Of all intervals."""
RESAMPLES = 2000
BATCH = 2**22
"""Numbers that the bootstrap holds at once."""
ALL = "all"
"""Items of all groups together."""
CHANCE = "chance"


@dataclass(frozen=True)
class Row:
    """One figure."""

    task: str
    group: str
    x: int | None
    """Place on the axis of the task; None for all places together."""
    measure: str
    """``accuracy``, ``reciprocal rank``, ``nats`` for each item, or ``perplexity``."""
    arm: str
    """What was measured: an arm, a difference of two (``a - b``), a simple rule, or chance."""
    items: int
    value: float
    low: float | None = None
    """Ends of the interval of 95 %; None where there is none."""
    high: float | None = None


def mean_with_interval(
    values: NDArray[np.float64], counted: bool, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """The mean of items and the ends of its interval.

    Args:
        values: (I,) of each item.
        counted: whether each is 0 or 1, so that the interval is Wilson's. Else it is a percentile
            bootstrap over items.
        seed: of the bootstrap.
    """
    mean = float(values.mean())
    if counted and set(np.unique(values)) <= {0.0, 1.0}:
        found = binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, "wilson")
        return mean, float(found.low), float(found.high)
    if len(values) < 2:
        return mean, None, None
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def summarize(task: str, items: Sequence[Item], scores: Mapping[str, Sequence[Score]]) -> list[Row]:
    """The rows of a task: by group and place, and over all of them.

    Args:
        task: its name.
        items: all.
        scores: by arm, of each item; the first arm is compared with each of the others.
    """
    rows = []
    groups = sorted({item.group for item in items}, key=_natural)
    for group in [*groups, ALL] if len(groups) > 1 else groups:
        own = [n for n, item in enumerate(items) if group in (ALL, item.group)]
        for x in [*sorted({items[n].x for n in own}), None]:
            chosen = [n for n in own if x in (None, items[n].x)]
            picked = {arm: [of[n] for n in chosen] for arm, of in scores.items()}
            for row in _rows([items[n] for n in chosen], picked):
                rows.append(Row(task, group or ALL, x, *row))
    return rows


def _exponentials(
    mean: float, low: float | None, high: float | None
) -> tuple[float, float | None, float | None]:
    return (
        math.exp(mean),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
    )


def _natural(name: str) -> tuple[object, ...]:
    """A key that sorts numbers in names by their size."""
    first = name.split(" ")[0]
    return (0, int(first), name) if first.isdigit() else (1, 0, name)


Figure = tuple[str, str, int, float, float | None, float | None]


def _rows(items: Sequence[Item], scores: Mapping[str, Sequence[Score]]) -> Iterator[Figure]:
    measures: dict[str, dict[str, NDArray[np.float64]]] = {
        "accuracy": {arm: np.array([s.right for s in of]) for arm, of in scores.items()},
        "nats": {arm: np.array([s.nats for s in of]) for arm, of in scores.items()},
    }
    if all(item.candidates for item in items):
        measures["reciprocal rank"] = {
            arm: np.array([s.reciprocal_rank for s in of], float) for arm, of in scores.items()
        }
    for measure, values in measures.items():
        counted = measure == "accuracy"
        for arm, own in values.items():
            yield measure, arm, len(own), *mean_with_interval(own, counted)
        first, *others = values
        if measure == "nats" and not any(item.candidates for item in items):
            for arm, own in values.items():
                figures = mean_with_interval(own, False)
                yield "perplexity", arm, len(own), *_exponentials(*figures)
        for other in others:
            difference = mean_with_interval(values[first] - values[other], False)
            yield measure, f"{first} - {other}", len(items), *difference
    if not any(item.chance for item in items):
        return
    rules = {rule for item in items for rule in item.rivals}
    for rule in sorted(rules):
        right = np.array([item.rivals.get(rule, 0.0) for item in items])
        yield "accuracy", rule, len(items), *mean_with_interval(right, True)
    chance = float(np.mean([item.chance for item in items]))
    yield "accuracy", CHANCE, len(items), chance, None, None
