"""Scores and bucket maxima in one pass over the memory: a Triton kernel for the bucketed search.

A program holds a block of queries, walks over the memory once, and keeps the best slot of each of
its buckets in registers: only these candidates are written. Two slots of a bucket are L slots
apart; L is the number of buckets. Factors are rounded to bfloat16 and summed in fp32.

Correct under Triton's interpreter; not yet run on a GPU.

Shapes: B rows, G key/value heads, Q queries, M slots, D head width, L buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...view import Readable
from ..protocol import Neighbours
from .cpu_scan import odd_stride
from .torch_buckets import best_buckets

WIDEST = 256
"""Largest head width D at which queries and a block of keys fit together."""
BLOCK_BUCKETS = 64
"""Buckets of a program."""


@triton.jit(do_not_specialize=["count", "size", "used", "num_buckets", "groups"])
def bucket_maxima_kernel(
    queries: tl.tensor,  # (B * G, Q, D) in FACTOR
    keys: tl.tensor,  # all rows' (rows * G, M, D), as stored
    scales: tl.tensor,  # (B * G, M) fp32, read only if SCALED
    valid: tl.tensor,  # (B, used) int8
    ends: tl.tensor,  # (B,) int32, one past the last valid slot
    owners: tl.tensor,  # (B,) int64, the row of the keys that a row reads
    best: tl.tensor,  # (B * G, Q, L) fp32, out
    slots: tl.tensor,  # (B * G, Q, L) int64, out
    count: tl.tensor,
    size: tl.tensor,
    used: tl.tensor,
    num_buckets: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One block of queries against one block of buckets of one row and head."""
    # Programs that run together share keys, not queries: keys are what comes from afar.
    program = tl.program_id(0)
    query_blocks = (count + BLOCK_Q - 1) // BLOCK_Q
    bucket_blocks = (num_buckets + BLOCK_L - 1) // BLOCK_L
    query = program % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bucket = program // query_blocks % bucket_blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    head = (program // query_blocks // bucket_blocks).to(tl.int64)
    row = head // groups
    stored = tl.load(owners + row) * groups + head % groups
    column = tl.arange(0, BLOCK_D)
    real_column = column[None, :] < WIDTH

    query_at = queries + (head * count + query[:, None]) * WIDTH + column[None, :]
    asked = tl.load(query_at, (query[:, None] < count) & real_column, 0.0)
    key_at = keys + (stored * size + bucket[:, None]) * WIDTH + column[None, :]
    scale_at = scales + stored * size + bucket
    valid_at = valid + row * used + bucket
    top = tl.full([BLOCK_Q, BLOCK_L], -float("inf"), tl.float32)
    turn = tl.full([BLOCK_Q, BLOCK_L], 0, tl.int32)
    end = tl.load(ends + row)
    for now in tl.range(0, (end + num_buckets - 1) // num_buckets):
        inside = (bucket < num_buckets) & (bucket < end - now * num_buckets)
        counted = tl.load(valid_at, inside, 0) != 0
        key = tl.load(key_at, inside[:, None] & real_column, 0.0)
        score = tl.dot(asked, tl.trans(key.to(tl.float32).to(FACTOR)))
        if SCALED:
            score = score * tl.load(scale_at, inside, 0.0)[None, :]
        # Asked last: where a slot does not count the score may be anything, also NaN.
        won = (score > top) & counted[None, :]
        top = tl.where(won, score, top)
        turn = tl.where(won, now, turn)
        key_at += num_buckets * WIDTH
        scale_at += num_buckets
        valid_at += num_buckets

    out = (head * count + query[:, None]) * num_buckets + bucket[None, :]
    real = (query[:, None] < count) & (bucket[None, :] < num_buckets)
    tl.store(best + out, top, real)
    tl.store(slots + out, turn * num_buckets + bucket[None, :], real)


def triton_buckets(
    queries: Tensor, memory: Readable, count: int, buckets: int, score_bytes: int
) -> Neighbours:
    """The ``count`` best of the best slots of ``buckets`` buckets, or of more where they are fewer
    than ``count``; by scores of factors in bfloat16."""
    buckets = max(buckets, odd_stride(count))
    return best_buckets(bucket_maxima, queries, memory, count, buckets, score_bytes)


def bucket_maxima(
    queries: Tensor,
    memory: Readable,
    num_buckets: int,
    rows: slice = slice(None),
    score_bytes: int = 0,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch_buckets.BucketMaxima``; D is at most ``WIDEST``, and no scores are held."""
    queries = queries[rows]
    batch, groups, count, width = queries.shape
    shape = (batch, groups, count, num_buckets)
    best = torch.empty(shape, dtype=torch.float32, device=queries.device)
    slots = torch.empty(shape, dtype=torch.int64, device=queries.device)
    used = memory.max_fill
    if not used:
        return best.fill_(-torch.inf), slots.zero_()
    valid = (memory.valid(used) if counted is None else counted)[rows]
    number = torch.arange(1, used + 1, dtype=torch.int32, device=queries.device)
    keys, scales, owners = memory.keys, memory.key_scales, memory.owners
    if owners is None:
        owners = torch.arange(keys.shape[0], device=keys.device)
    # A CPU means Triton's interpreter, whose products know no bfloat16.
    interpreted = queries.device.type == "cpu"
    # What fits into the registers of eight warps and the shared memory of an A100.
    wide = width > 128
    block = min(64 if wide else 128, max(16, triton.next_power_of_2(count)))
    programs = triton.cdiv(count, block) * triton.cdiv(num_buckets, BLOCK_BUCKETS)
    # Triton launches on the current GPU, whichever the tensors are on.
    with torch.cuda.device_of(queries):
        bucket_maxima_kernel[(batch * groups * programs,)](
            queries.to(torch.float32 if interpreted else torch.bfloat16).contiguous(),
            keys,
            keys if scales is None else scales,
            valid.to(torch.int8),
            (valid * number).amax(1),
            owners[rows],
            best,
            slots,
            count,
            memory.size,
            used,
            num_buckets,
            groups,
            WIDTH=width,
            SCALED=scales is not None,
            FACTOR=tl.float32 if interpreted else tl.bfloat16,
            BLOCK_Q=block,
            BLOCK_L=BLOCK_BUCKETS,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            num_warps=4 if block < 64 else 8,
            num_stages=2 if wide or keys.dtype == torch.float32 else 3,
        )
    return best, slots
