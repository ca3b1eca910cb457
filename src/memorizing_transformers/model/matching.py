"""How far the text up to a retrieved pair repeats the text up to the query.

Shapes: B rows, N segment, H query heads, K neighbours, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..memory import Readable


def match_lengths(
    input_ids: Tensor,
    memory: Readable,
    slots: Tensor,
    longest: int,
    shift: int,
    read: Readable | None = None,
) -> Tensor:
    """How many tokens up to a pair equal those up to the query: (B, H, N, K) int64, 0 to longest.

    With ``shift`` 1 the text before the pair is compared, so the pair itself is what followed then.
    Tokens that were overwritten, or lie before the document, match nothing.

    Args:
        input_ids: of the segment, which follows what the rows have read, up to these N tokens.
        memory: where the pairs are, for these B rows.
        slots: (B, H, N, K) of the memory.
        longest: where counting stops.
        shift: tokens between the pair and the end of the text that is compared.
        read: the memory with what the B rows have read before the segment. Default: ``memory``.
    """
    size, segment = memory.size, slots.shape[2]
    earlier = input_ids.shape[1] - segment
    stored = memory.token_ids
    flat = slots.flatten(1)
    # For each pair how many older ones of its document the memory still holds.
    older = (memory.used[:, None] - 1 - memory.age().gather(1, flat)).view(slots.shape)
    # The newest tokens before the segment; -1 where there are none.
    back = torch.arange(longest - 1, 0, -1, device=stored.device)
    read = memory if read is None else read
    back = back.to(read.device)
    newest = read.written - read.origin
    before = read.token_ids.gather(1, (newest[:, None] - back) % read.size)
    before = before.masked_fill(back > read.used[:, None], -1).to(stored)
    text = torch.cat([before, input_ids.to(stored)], 1)
    alive = torch.ones_like(slots, dtype=torch.bool)
    count = torch.zeros_like(slots)
    for step in range(longest):
        there = stored.gather(1, (flat - shift - step) % size).view(slots.shape)
        first = longest - 1 - step + earlier
        here = text[:, first : first + segment, None]
        alive = alive & (there == here[:, None]) & (older >= shift + step)
        count += alive
    return count


class MatchBias(nn.Module):
    """A learned bias for each match length, with and without a shift of one token.

    Args:
        num_heads: query heads H.
        longest: the longest match that is told from shorter ones.
    """

    def __init__(self, num_heads: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.table = nn.Parameter(torch.zeros(2, longest + 1, num_heads))

    def forward(self, lengths: Tensor) -> Tensor:
        """The bias (B, H, N, K) fp32 of match lengths (2, B, H, N, K)."""
        table = self.table.to(lengths.device, torch.float32)
        head = torch.arange(table.shape[2], device=lengths.device)[:, None, None]
        return table[0][lengths[0], head] + table[1][lengths[1], head]
