"""Scoring a memory block by block, so that the full score tensor never lives.

Shapes: B rows, G key/value heads, Q queries, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...view import Readable

SCORE_BYTES = 64 * 2**20
"""Scores that may live at once. Small enough to stay near the cache, large enough for the BLAS."""


WASTE = 1.25
"""Slots that may be scored for each one in use, so that rows are scored together."""


def runs(bounds: list[int], waste: float = WASTE) -> Iterator[tuple[slice, int]]:
    """Consecutive rows that are scored together, and up to which slot; rows without a pair in none.

    A run's slots are at most ``waste`` times those in use.

    Args:
        bounds: by row the slots in use.
        waste: bound on what is scored for nothing.
    """
    first, most, total = 0, 0, 0
    for row, bound in enumerate([*bounds, 0]):
        longest = max(most, bound)
        if bound and (row - first + 1) * longest <= waste * (total + bound):
            most, total = longest, total + bound
            continue
        if most:
            yield slice(first, row), most
        first, most, total = (row, bound, bound) if bound else (row + 1, 0, 0)


def score_blocks(
    queries: Tensor,
    memory: Readable,
    score_bytes: int = SCORE_BYTES,
    multiple: int = 1,
    chosen: slice = slice(None),
    counted: Tensor | None = None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield ``(rows, first slot, scores)`` with scores (rows, G, Q, block) in fp32.

    Empty slots score minus infinity. Slots past what a row and those next to it hold are not read
    at all, and nothing is yielded for them.

    Args:
        queries: (B, G, Q, D) detached.
        memory: what to score against.
        score_bytes: bound on the bytes of one block of scores.
        multiple: every block but the last has a multiple of so many slots.
        chosen: the rows to score, consecutive.
        counted: what ``memory.valid(memory.max_fill)`` gives, if it is known.
    """
    batch, groups, count, _ = queries.shape
    per_row = groups * count * 4
    bounds = memory.bounds
    valid = memory.valid(memory.max_fill) if counted is None else counted
    begin, end, _ = chosen.indices(batch)
    for run, used in runs(bounds[begin:end]):
        block = max(1, min(used, score_bytes // per_row) // multiple) * multiple
        rows_at_once = max(1, score_bytes // (per_row * block))
        for first_row in range(begin + run.start, begin + run.stop, rows_at_once):
            rows = slice(first_row, min(begin + run.stop, first_row + rows_at_once))
            rows_queries = queries[rows].float()
            for start in range(0, used, block):
                slots = slice(start, min(used, start + block))
                scores = rows_queries @ memory.keys_at((rows, slice(None), slots)).transpose(-1, -2)
                # Asking costs a wait on a GPU, filling a pass over the scores on a CPU.
                if scores.is_cuda or not valid[rows, slots].all():
                    scores.masked_fill_(~valid[rows, None, None, slots], -torch.inf)
                yield rows, start, scores
