"""Scores and bucket maxima in one pass over the memory: a Triton kernel for the bucketed search.

A program holds a block of queries, walks over the memory once, and keeps the best slot of each of
its buckets in registers: nothing but these candidates is ever written. A bucket's slots stand L
apart, L being the number of buckets.

Verified under Triton's interpreter and compiled for compute capability 8.0 and 9.0, not yet timed
on a GPU: block sizes and warps are what registers and shared memory of an A100 and H200 allow.

Shapes: B rows, G key/value heads, Q queries, M slots, D head width, L buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ring import Memory

WIDEST = 256
"""Head width from which on a block of keys no longer fits beside the queries."""
BLOCK_BUCKETS = 64
"""Buckets of a program; their number is rounded up to a multiple."""


@triton.jit
def bucket_maxima_kernel(
    queries: tl.tensor,  # (B * G, Q, D) in the dtype of the products
    keys: tl.tensor,  # (B * G, M, D) as stored
    scales: tl.tensor,  # (B * G, M) fp32, read only if SCALED
    valid: tl.tensor,  # (B, used) int8
    ends: tl.tensor,  # (B,) int32, one past the last slot in use
    best: tl.tensor,  # (B * G, Q, L) fp32, out
    slots: tl.tensor,  # (B * G, Q, L) int32, out
    count: tl.tensor,
    size: tl.tensor,
    used: tl.tensor,
    num_buckets: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One block of queries against one block of buckets of one row and head."""
    # Neighbouring programs share keys, not queries: keys are what comes from afar.
    program = tl.program_id(0)
    query_blocks = tl.cdiv(count, BLOCK_Q)
    query_block = program % query_blocks
    bucket_block = program // query_blocks % (num_buckets // BLOCK_L)
    head = (program // query_blocks // (num_buckets // BLOCK_L)).to(tl.int64)
    row = head // groups

    asked = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bucket = bucket_block * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    query_at = queries + (head * count + asked[:, None]) * WIDTH + column[None, :]
    query = tl.load(query_at, (asked[:, None] < count) & (column[None, :] < WIDTH), 0.0)

    key_at = keys + (head * size + bucket[:, None]) * WIDTH + column[None, :]
    scale_at = scales + head * size + bucket
    valid_at = valid + row * used + bucket
    top = tl.full([BLOCK_Q, BLOCK_L], -float("inf"), tl.float32)
    turn = tl.zeros([BLOCK_Q, BLOCK_L], tl.int32)
    end = tl.load(ends + row)
    for now in tl.range(0, tl.cdiv(end, num_buckets)):
        inside = now * num_buckets + bucket < end
        counted = tl.load(valid_at, inside, 0) != 0
        key = tl.load(key_at, inside[:, None] & (column[None, :] < WIDTH), 0.0)
        score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if SCALED:
            score = score * tl.load(scale_at, inside, 0.0)[None, :]
        # Not so where the score is NaN: an unused slot may hold anything.
        won = (score > top) & counted[None, :]
        top = tl.where(won, score, top)
        turn = tl.where(won, now, turn)
        key_at += num_buckets.to(tl.int64) * WIDTH
        scale_at += num_buckets
        valid_at += num_buckets

    out = (head * count + asked[:, None]) * num_buckets + bucket[None, :]
    tl.store(best + out, top, asked[:, None] < count)
    tl.store(slots + out, turn * num_buckets + bucket[None, :], asked[:, None] < count)


def bucket_maxima(
    queries: Tensor, memory: Memory, num_buckets: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best slot of each bucket.

    Args:
        queries: (B, G, Q, D).
        memory: what is searched.
        num_buckets: buckets L at least.
        dtype: of the products' factors, bfloat16 or float32; sums are fp32.

    Returns:
        scores (B, G, Q, L) fp32, minus infinity where a bucket is empty, and slots (B, G, Q, L)
        int32; L is a multiple of ``BLOCK_BUCKETS``.
    """
    batch, groups, count, width = queries.shape
    num_buckets = triton.cdiv(num_buckets, BLOCK_BUCKETS) * BLOCK_BUCKETS
    shape = (batch, groups, count, num_buckets)
    best = torch.empty(shape, dtype=torch.float32, device=queries.device)
    slots = torch.empty(shape, dtype=torch.int32, device=queries.device)
    used = memory.max_fill
    valid = memory.valid(used)
    number = torch.arange(1, used + 1, dtype=torch.int32, device=queries.device)
    ends = (valid * number).amax(1) if used else valid.new_zeros(batch, dtype=torch.int32)
    block_q = min(128, max(16, triton.next_power_of_2(count)))
    wide = dtype == torch.float32 or width > 128
    grid = (batch * groups * (num_buckets // BLOCK_BUCKETS) * triton.cdiv(count, block_q),)
    bucket_maxima_kernel[grid](
        queries.to(dtype).contiguous(),
        memory.keys,
        memory.keys if memory.key_scales is None else memory.key_scales,
        valid.to(torch.int8),
        ends,
        best,
        slots,
        count,
        memory.size,
        used,
        num_buckets,
        groups,
        WIDTH=width,
        SCALED=memory.key_scales is not None,
        BLOCK_Q=min(block_q, 64) if wide else block_q,
        BLOCK_L=BLOCK_BUCKETS,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        num_warps=4 if block_q < 128 or wide else 8,
        num_stages=2 if wide else 3,
    )
    return best, slots
