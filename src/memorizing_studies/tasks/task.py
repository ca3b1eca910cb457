"""What a task is: a way to make items of documents, and how its results are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal, TypeVar

from .items import Sheet
from .texts import Texts

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What items are made with.

    Args:
        seed: of all that is drawn.
        questions: choices of a task, at most about so many.
        candidates: candidates of a choice, at most.
        min_distance: tokens, the shortest distance.
        max_tokens: tokens of a document that are looked at.
    """

    seed: int = 0
    questions: int = 200
    candidates: int = 128
    min_distance: int = 256
    max_tokens: int = 65536

    def edges(self) -> list[int]:
        """Lower edges of the ranges of distances; each range is twice as long as the one before."""
        found = [self.min_distance]
        while found[-1] * 2 < self.max_tokens:
            found.append(found[-1] * 2)
        return found

    def edge(self, distance: int) -> int:
        """The lower edge of the range of a distance."""
        return max(edge for edge in self.edges() if edge <= distance)

    def random(self, task: str) -> Random:
        """Random numbers of one task; another task does not change them."""
        return Random(f"{self.seed} {task}")


class Task(ABC):
    """A task.

    It makes the same items of the same documents and settings each time.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shows: ClassVar[str]
    """What a reader learns from it, in a sentence."""
    axis: ClassVar[str]
    """What ``x`` of its items is."""
    measure: ClassVar[Literal["accuracy", "nats"]] = "accuracy"
    """What its plot shows."""

    @abstractmethod
    def build(
        self, texts: Texts, settings: Settings, random: Random, skipped: Counter[str]
    ) -> list[Sheet]:
        """The items.

        Args:
            texts: the documents.
            settings: what they are made with.
            random: random numbers of this task.
            skipped: how many documents or items are left out is counted here, by the reason.
        """


def drawn_evenly(
    found: Iterable[T], cell: Callable[[T], Any], most: int, random: Random
) -> list[T]:
    """At most about ``most`` of many, as evenly over their cells as there are; in the same order.

    Args:
        found: all.
        cell: of one of them, what it is grouped by.
        most: how many are wanted.
        random: what draws.
    """
    everything = list(found)
    cells: dict[Any, list[int]] = defaultdict(list)
    for number, one in enumerate(everything):
        cells[cell(one)].append(number)
    kept: list[int] = []
    left = most
    for place, numbers in enumerate(sorted(cells.values(), key=len)):
        share = -(-left // (len(cells) - place))
        taken = random.sample(numbers, min(len(numbers), max(1, share)))
        kept += taken
        left = max(0, left - len(taken))
    return [everything[number] for number in sorted(kept)]
