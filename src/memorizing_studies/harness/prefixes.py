"""Sessions that have read many contexts, the beginnings that they share read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memorizing_transformers.generation.session import Session


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that both have."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def sessions_after(
    contexts: Sequence[Sequence[int]], begin: Callable[[], Session], device: torch.device
) -> Iterator[tuple[int, Session, Tensor]]:
    """Read each context as a document of its own.

    Args:
        contexts: token ids, each at least one.
        begin: makes a session of one row that has read nothing.
        device: where tokens are read.

    Yields:
        the number of a context, a session that has read it, which can be read on, and the logits
        (1, V) after its last token. The order is that of the tokens, so that contexts with a common
        beginning follow each other.
    """
    order = sorted(range(len(contexts)), key=lambda number: tuple(contexts[number]))
    known: list[tuple[int, Session]] = [(0, begin())]
    for place, number in enumerate(order):
        context = contexts[number]
        before = shared(contexts[order[place - 1]], context) if place else 0
        while known[-1][0] > before:
            known.pop()
        count, base = known[-1]
        session = base.take([0])
        after = 0
        if place + 1 < len(order):
            after = shared(context, contexts[order[place + 1]])
        # A part of the context is left to read, for the logits come from reading.
        stop = min(after, len(context) - 1)
        if stop > count:
            session.read(torch.tensor([context[count:stop]], device=device))
            known.append((stop, session.take([0])))
            count = stop
        logits = session.read(torch.tensor([context[count:]], device=device))
        yield number, session, logits
