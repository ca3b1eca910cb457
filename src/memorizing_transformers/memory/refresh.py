"""Encoding stored pairs again with the current weights, and dropping those that drifted too far.

A bank keeps the tokens behind its pairs, so a row's document can be read again, segment by segment,
as it was read at first. What a key depends on may have been overwritten since: with an XL cache the
tokens before its segment, below a second memory layer what was retrieved for it. Whatever the
memory still holds is used again; a document that has never wrapped around is encoded exactly.

Shapes: B rows, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import MemoryBank, SegmentPairs
from .cache import XLCache
from .ring import Memory

Encode = Callable[[Tensor, MemoryBank], SegmentPairs]
"""The pairs, up to the last memory layer, of tokens (B, N), on any device, that follow what is
stored."""


class _Document:
    """The stored documents of a bank's rows, as segments that can be read again.

    Args:
        encode: the model.
        bank: with at least one memory; all of them hold pairs of the same tokens.
        segment: tokens N of the segments that the documents were read in.
    """

    def __init__(self, encode: Encode, bank: MemoryBank, segment: int) -> None:
        self.encode = encode
        self.rows = bank.batch_size
        self.segment = segment
        self.memory: Memory = bank.memories[min(bank.memories)]
        last = max(bank.memories)
        self.caches = {layer: cache for layer, cache in bank.caches.items() if layer < last}
        longest = max((cache.size for cache in self.caches.values()), default=0)
        self.lead = -(-longest // segment)
        """Segments that are only read to fill the caches."""
        self.end = self.memory.written.clone()
        self.start = self._start()

    def _start(self) -> Tensor:
        """(B,) the oldest pair that begins a segment and can be retrieved and encoded."""
        memory = self.memory
        first, held = (memory.written - count for count in (memory.fill, memory.used))
        start, held = (-(-number // self.segment) * self.segment for number in (first, held))
        return torch.where(held > 0, torch.maximum(start, held + self.lead * self.segment), start)

    def tokens(self, begin: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, N) from pair ``begin`` (B,) on, and which of them there are."""
        numbers = begin[:, None] + torch.arange(self.segment, device=begin.device)
        slots = (numbers - self.memory.origin[:, None]) % self.memory.size
        there = (numbers >= 0) & (numbers < self.end[:, None])
        return self.memory.token_ids.gather(1, slots).long().masked_fill(~there, 0), there

    def caches_before_start(self) -> dict[int, XLCache]:
        """What the XL caches would hold before ``start``."""
        caches = {layer: copy(cache) for layer, cache in self.caches.items()}
        before = MemoryBank(self.rows, {}, caches)
        before.reset()
        for turn in range(self.lead, 0, -1):
            ids, there = self.tokens(self.start - turn * self.segment)
            if there.any():
                before.commit(self.encode(ids, before), there)
        return caches


@torch.no_grad()
def refresh(encode: Encode, bank: MemoryBank, segment: int, step: int) -> None:
    """Encode what a bank's memories hold again, in place; XL caches stay as they are.

    Where a document's beginning was overwritten, the pairs of a segment that is incomplete
    stay as they were, and with an XL cache those of the segments that fill it. Costs a forward pass
    of every stored token, and memory for one segment.

    Args:
        encode: the model, in evaluation mode.
        bank: what to refresh; its segments were committed with ``token_ids``.
        segment: tokens N of the segments that were committed.
        step: the training step to note with the pairs.
    """
    if not bank.memories:
        return
    document = _Document(encode, bank, segment)
    last = max(bank.memories)
    # The last memory layer's pairs do not depend on what it retrieves itself.
    lower = {layer: memory for layer, memory in bank.memories.items() if layer < last}
    caches = document.caches_before_start()
    read = MemoryBank(bank.batch_size, lower, caches)
    write = MemoryBank(bank.batch_size, bank.memories, caches)
    turns = -(-int((document.end - document.start).max()) // segment)
    with ExitStack() as stack:
        for memory in bank.memories.values():
            stack.enter_context(memory.rewound(document.start))
        for turn in range(turns):
            ids, there = document.tokens(document.start + turn * segment)
            write.commit(encode(ids, read), there, ids, step)


@torch.no_grad()
def oldest_drift(encode: Encode, bank: MemoryBank, segment: int) -> tuple[Tensor, Tensor]:
    """How far the keys of each row's oldest complete segment drifted, in the first memory layer.

    Costs a forward pass of one segment, and of those that fill an XL cache.

    Returns:
        the mean cosine (B,) of stored keys and today's, and how many of the row's oldest pairs (B,)
        to drop to be rid of that segment: 0 where the memory holds none, the cosine being 1.
    """
    document = _Document(encode, bank, segment)
    memory = document.memory
    ids, there = document.tokens(document.start)
    read = MemoryBank(bank.batch_size, {}, document.caches_before_start())
    fresh = encode(ids, read).memory[min(bank.memories)][0].to(memory.device).float()
    numbers = document.start[:, None] + torch.arange(segment, device=ids.device)
    slots = (numbers - memory.origin[:, None]) % memory.size
    rows = torch.arange(bank.batch_size, device=ids.device)[:, None]
    stored = memory.keys_at((rows, slice(None), slots)).transpose(1, 2)
    whole = there.all(1)
    cosine = F.cosine_similarity(stored, fresh, dim=-1).mean((1, 2))
    count = document.start + segment - (memory.written - memory.fill)
    return cosine.masked_fill(~whole, 1.0), count.masked_fill(~whole, 0)


def drop_drifted(encode: Encode, bank: MemoryBank, segment: int, least: float) -> None:
    """Drop the oldest segments of each row up to the first one whose mean cosine is ``least``.

    Drift grows with age, so younger ones are not looked at. Costs one ``oldest_drift`` and one more
    for every segment that is dropped from the row that loses most.

    Args:
        encode: the model, in evaluation mode.
        bank: what to look through; its segments were committed with ``token_ids``.
        segment: tokens N of the segments that were committed.
        least: bound on the cosine of stored keys and today's.
    """
    while bank.memories:
        cosine, count = oldest_drift(encode, bank, segment)
        count.masked_fill_(cosine >= least, 0)
        if not count.any():
            return
        for memory in bank.memories.values():
            memory.drop(count)
