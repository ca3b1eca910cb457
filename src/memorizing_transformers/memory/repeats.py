"""Finds where the last tokens of a text occurred before in its memory and its segment.

A chain for each order o leads from a token to the earlier ones that end the same o tokens, newest
first, as the hash chains of LZ77 compressors do. Hashes may collide, so candidates are compared
token by token. The cost of a segment does not depend on the size of the memory.

Pairs are numbered as in ``Memory``, and the tokens of the segment continue the numbers.

Shapes: B' reading rows, B rows of the memory, N segment, M slots, O orders, C = O K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .derived import Derived
from .lent import LentMemory
from .ring import Memory
from .view import Readable

ORDERS = (8, 4, 2)
"""Lengths of the suffixes that have a chain, descending."""
LEAD = max(ORDERS) - 1
TABLE_BITS = 16
FACTOR, OTHER = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
"""Odd multipliers of the hashes, as signed numbers: those of Steele et al., 2014 (SplitMix64)."""


class Repeats(NamedTuple):
    """Earlier occurrences of the text up to each token of a segment."""

    tokens: Tensor
    """(B', N, C) int64 the token that followed then."""
    lengths: Tensor
    """(B', N, C) int64 how many tokens up to there are the same, 0 where there is no candidate."""
    distances: Tensor
    """(B', N, C) int64 tokens since the occurrence, at least 1."""

    def longest(self) -> tuple[Tensor, Tensor]:
        """(B', N) the length of the longest, 0 where there is none, and the distance of the latest
        of that length."""
        lengths = self.lengths.amax(-1)
        longest = self.lengths == lengths[..., None]
        far = torch.iinfo(torch.int64).max
        return lengths, self.distances.masked_fill(~longest, far).amin(-1)


def _hashes(text: Tensor) -> list[Tensor]:
    """For each order the hash (B, T) of the tokens that end at each place of text (B, T)."""
    hashes, current, length = {}, (text + 1) * FACTOR, 1
    while length < max(ORDERS):
        hashes[length] = current
        earlier = torch.zeros_like(current)
        earlier[:, length:] = current[:, :-length]
        current = current * OTHER + earlier
        # Products and sums alone are linear: "abcd" and "acbd" would be the same.
        current = (current ^ ((current >> 32) & (2**32 - 1))) * FACTOR
        length *= 2
    hashes[length] = current
    return [(hashes[order] >> (64 - TABLE_BITS)) & (2**TABLE_BITS - 1) for order in ORDERS]


class _Chains:
    """The chains of one memory: derived from its tokens, so nothing to save.

    Args:
        memory: whose tokens are indexed.
    """

    def __init__(self, memory: Memory) -> None:
        rows, orders, device = memory.token_ids.shape[0], len(ORDERS), memory.device
        self.latest = torch.full((rows, orders, 2**TABLE_BITS), -1, device=device)
        """(B, O, 2^TABLE_BITS) by hash the number of the newest token, -1 for none."""
        self.before = torch.full((rows, orders, memory.size), -1, device=device)
        """(B, O, M) by slot the number of the token before it in its chain."""
        self.orders = torch.tensor(ORDERS, device=device)
        """(O,)."""
        self.end = torch.zeros(rows, dtype=torch.int64, device=device)
        """(B,) how many tokens were indexed."""
        self.document = memory.document.clone()
        self.offered = memory.offered - memory.size

    def catch_up(self, memory: Memory) -> None:
        """Index what was written since the last call."""
        changed = self.document != memory.document
        # Asking costs a wait on a GPU, filling a pass over the tables on a CPU.
        if changed.device.type != "cpu" or changed.any():
            self.latest.masked_fill_(changed[:, None, None], -1)
            self.document.copy_(memory.document)
        first = memory.written - memory.used
        self.end.copy_(torch.where(changed, first, torch.maximum(self.end, first)))
        # At least as many as the row with most has; a reset row has what was offered since.
        count = min(memory.offered - self.offered, memory.max_fill)
        self.offered = memory.offered
        if not count:
            return
        numbers = self.end[:, None] + torch.arange(-LEAD, count, device=self.end.device)
        text = memory.token_ids.gather(1, (numbers - memory.origin[:, None]) % memory.size).long()
        hashes = torch.stack(_hashes(text), 1)[..., LEAD:]
        numbers = numbers[:, LEAD:]
        there = numbers < memory.written[:, None]
        before = self.link(hashes, numbers, there)
        slots = ((numbers - memory.origin[:, None]) % memory.size)[:, None].expand_as(before)
        now = self.before.gather(2, slots)
        self.before.scatter_(2, slots, torch.where(there[:, None], before, now))
        newest = numbers[:, None].masked_fill(~there[:, None], -1).expand_as(hashes)
        self.latest.scatter_reduce_(2, hashes, newest, "amax")
        self.end.copy_(memory.written)

    def link(
        self, hashes: Tensor, numbers: Tensor, there: Tensor, owners: Tensor | None = None
    ) -> Tensor:
        """For tokens that follow what was indexed, the numbers (B', O, T) before in their chains.

        Args:
            hashes: (B', O, T).
            numbers: (B', T) ascending.
            there: (B', T) bool; the others are in no chain and come after those that are.
            owners: (B',) the row of the memory of each row, None for the same.
        """
        hashes = hashes.masked_fill(~there[:, None], 2**TABLE_BITS)
        ordered, order = hashes.sort(dim=-1, stable=True)
        number = numbers[:, None].expand_as(hashes).gather(-1, order)
        latest = self.latest if owners is None else self.latest[owners]
        found = latest.gather(-1, ordered.clamp(max=2**TABLE_BITS - 1))
        same = ordered[..., 1:] == ordered[..., :-1]
        found[..., 1:] = torch.where(same, number[..., :-1], found[..., 1:])
        return torch.empty_like(found).scatter_(-1, order, found)


class RepeatSearch:
    """Finds the latest occurrences of the last tokens.

    Args:
        per_order: occurrences K that are looked at for each order.
        longest: where matches are no longer counted.
    """

    def __init__(self, per_order: int = 8, longest: int = 16) -> None:
        self.per_order = per_order
        self.longest = longest
        self._chains: Derived[_Chains] = Derived()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, memory: Readable) -> Repeats:
        """Look for each token of a segment at the text that ends with it; changes no memory.

        A token knows of those before it alone: of the segment's as of the memory's.

        Args:
            input_ids: (B', N) the segment, which follows what the memory holds.
            memory: of these B' rows.
        """
        if isinstance(memory, LentMemory):
            return Repeats(*memory.find_repeats(input_ids, len(ORDERS) * self.per_order))
        base = memory.base
        chains = self._chains.get(base)
        if chains is None:
            chains = self._chains[base] = _Chains(base)
        chains.catch_up(base)
        ids = input_ids.to(base.device)
        segment, size, owners = ids.shape[1], base.size, memory.owners
        device = base.device
        written, origin = memory.written, memory.origin
        here = written[:, None] + torch.arange(segment, device=device)
        # All tokens in their order, the segment's last; the first one has this number. It begins so
        # far back that a short memory too can be compared with the tokens before it.
        length = max(size, LEAD, self.longest)
        start = written - length
        ring = (start[:, None] + torch.arange(length, device=device) - origin[:, None]) % size
        text = torch.cat([memory.token_ids.gather(1, ring).long(), ids], 1)
        first = written - memory.fill
        known = text[:, -LEAD - segment :]
        numbers = self._candidates(chains, owners, known, here, first, origin)
        order = chains.orders.repeat_interleave(self.per_order)
        places = numbers - start[:, None, None]
        lengths = self._lengths(places, (first - start)[:, None, None], text, segment)
        # What also ends a longer suffix is in that one's chain.
        above = torch.cat([torch.full_like(order[:1], self.longest + 1), chains.orders[:-1]])
        above = above.repeat_interleave(self.per_order)
        lengths = lengths.masked_fill((lengths < order) | (lengths >= above), 0)
        following = text.gather(1, (places + 1).clamp(min=0).flatten(1)).view(places.shape)
        return Repeats(following, lengths, here[..., None] - numbers)

    def _candidates(
        self,
        chains: _Chains,
        owners: Tensor | None,
        known: Tensor,
        here: Tensor,
        first: Tensor,
        origin: Tensor,
    ) -> Tensor:
        """(B', N, C) numbers of tokens that may end the same suffix; those before ``first`` do not.

        Args:
            chains: of the memory.
            owners: (B',) the row of the memory of each row, None for the same.
            known: (B', LEAD + N) the segment's tokens and those before.
            here: (B', N) the numbers of the segment's tokens.
            first: (B',) the first number that the memory holds.
            origin: (B',) of the memory.
        """
        hashes = torch.stack(_hashes(known), 1)[..., LEAD:]
        own = chains.link(hashes, here, torch.ones_like(here, dtype=torch.bool), owners)
        before = chains.before if owners is None else chains.before[owners]
        size, written = before.shape[-1], here[:, :1, None]
        links = torch.cat([before, own], -1)
        found = [own]
        for _ in range(self.per_order - 1):
            last = found[-1]
            usable = last >= first[:, None, None]
            slot = torch.where(
                last >= written, last - written + size, (last - origin[:, None, None]) % size
            )
            following = links.gather(-1, slot.masked_fill(~usable, 0))
            found.append(following.masked_fill(~usable, -1))
        return torch.stack(found, -1).permute(0, 2, 1, 3).flatten(2)

    def _lengths(self, places: Tensor, first: Tensor, text: Tensor, segment: int) -> Tensor:
        """(B', N, C) how many tokens of text (B', M + N) up to ``places`` equal those up to the
        segment's own; none before ``first``."""
        count = torch.zeros_like(places)
        alive = places >= first
        for back in range(self.longest):
            then = places - back
            stop = text.shape[1] - back
            now = text[:, stop - segment : stop, None]
            same = text.gather(1, then.clamp(min=0).flatten(1)).view(then.shape) == now
            alive = alive & (then >= first) & same
            count = torch.where(alive, back + 1, count)
        return count
