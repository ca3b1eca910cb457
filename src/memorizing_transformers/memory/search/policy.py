"""Which kernel a bucketed search runs: one table of kernels, one function that chooses.

Shapes: B rows, G key/value heads, Q queries of a head group, D head width, L buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import NamedTuple

import torch
from torch import Tensor

from ..view import Readable
from .kernels.cpu_scan import HostScan
from .kernels.int8_scan import has_fast_int8, quantized_search
from .kernels.top_k import members_for
from .kernels.torch_buckets import torch_buckets
from .protocol import Neighbours

ROUGH_RECALL = 0.97
"""Recall targets up to this one allow rough scores, in int8 or bfloat16, where they are fast."""
SPARE = 4
"""One spare candidate for every so many neighbours makes up for ranks that bfloat16 confuses."""
ROUGH_SLOTS = 32768
"""With fewer, an exact search costs a CPU less: scoring candidates again outweighs what bfloat16
saves, and in fp32 buckets save nothing."""
QUANTIZED_SLOTS = 4096
"""With fewer, int8 saves less than it costs to prepare; measured at widths of 32 and 64."""
QUANTIZED_QUERIES = 128
"""For fewer queries a head, likewise."""
FEW_QUERIES = 16
"""For fewer queries than this, reading the keys is all the cost there is."""


class KernelFailed(Exception):
    """A kernel that this machine cannot run after all."""


class Kernel(NamedTuple):
    """One way to find candidates."""

    run: Callable[[Tensor, Readable, int, int, int], Neighbours]
    """Takes queries (B, G, Q, D), the memory, the number of candidates, the number of buckets and
    the bytes of scores that may live at once; returns the candidates."""
    rough: bool = False
    """Whether its scores are rounded, so that the candidates must be scored again in fp32."""


def _exact(q: Tensor, memory: Readable, count: int, buckets: int, room: int) -> Neighbours:
    return HostScan(None, torch.float32, room)(q, memory, count)


def _float32(q: Tensor, memory: Readable, count: int, buckets: int, room: int) -> Neighbours:
    return HostScan(buckets, torch.float32, room)(q, memory, count)


def _bfloat16(q: Tensor, memory: Readable, count: int, buckets: int, room: int) -> Neighbours:
    return HostScan(buckets, torch.bfloat16, room)(q, memory, count)


def _int8(q: Tensor, memory: Readable, count: int, buckets: int, room: int) -> Neighbours:
    # It has buckets of its own and scores their members again itself, head by head.
    return quantized_search(q, memory, count, room)


def _triton(q: Tensor, memory: Readable, count: int, buckets: int, room: int) -> Neighbours:
    from triton import TritonError

    from .kernels.triton_buckets import triton_buckets

    try:
        return triton_buckets(q, memory, count, buckets, room)
    except TritonError as error:
        raise KernelFailed(str(error)) from error
    # To start a first kernel Triton runs a C compiler and ldconfig and writes to its cache.
    except CalledProcessError as error:  # as of a compiler that finds no Python.h
        said = f"{error.cmd[0]}, which Triton runs, ended with code {error.returncode}"
        raise KernelFailed(said) from error
    except OSError as error:
        raise KernelFailed(str(error)) from error
    except (RuntimeError, AssertionError) as error:
        if not any(name in str(error) for name in ("C compiler", "libcuda")):
            raise
        raise KernelFailed(" ".join(str(error).split())) from error


KERNELS = {
    "cpu exact": Kernel(_exact),
    "cpu float32": Kernel(_float32),
    "cpu bfloat16": Kernel(_bfloat16, rough=True),
    "cpu int8": Kernel(_int8),
    "torch": Kernel(torch_buckets),
    "triton": Kernel(_triton, rough=True),
}


class KernelChoice(NamedTuple):
    """A kernel, how many candidates it is asked for, and why."""

    name: str
    candidates: int
    reason: str


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_tile"))


@cache
def has_fused_kernel() -> bool:
    """Whether this machine's GPU can run the Triton kernel (Ampere or later)."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def choose_kernel(
    queries: Tensor, memory: Readable, top_k: int, num_buckets: int, recall_target: float
) -> KernelChoice:
    """The kernel that suits a search.

    Args:
        queries: (B, G, Q, D).
        memory: what is searched; its ``max_fill`` counts.
        top_k: neighbours a query.
        num_buckets: buckets L that the recall target needs.
        recall_target: expected share of the true neighbours.
    """
    rough, count = recall_target <= ROUGH_RECALL, queries.shape[2]
    if queries.device.type != "cpu":
        if not rough:
            return KernelChoice("torch", top_k, f"a recall target above {ROUGH_RECALL}")
        if not has_fused_kernel():
            return KernelChoice("torch", top_k, "no Triton, or a GPU older than Ampere")
        from .kernels.triton_buckets import WIDEST

        if queries.shape[-1] > WIDEST:
            return KernelChoice("torch", top_k, f"heads wider than {WIDEST}")
        return KernelChoice("triton", top_k + top_k // SPARE, "scores and maxima in one kernel")
    used = memory.max_fill
    if rough and used >= QUANTIZED_SLOTS and count >= QUANTIZED_QUERIES and has_fast_int8():
        return KernelChoice("cpu int8", top_k, "instructions for int8")
    if used < max(ROUGH_SLOTS, members_for(top_k) * num_buckets):
        return KernelChoice("cpu exact", top_k, "few slots, so an exact scan costs no more")
    if count < FEW_QUERIES:
        return KernelChoice("cpu exact", top_k, "few queries, so an exact scan costs no more")
    if not (rough and has_fast_bfloat16()):
        return KernelChoice("cpu float32", top_k, "no fast bfloat16, or a high recall target")
    spare = min(top_k // SPARE, used - top_k)
    return KernelChoice("cpu bfloat16", top_k + spare, "instructions for bfloat16")
