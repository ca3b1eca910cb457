"""Approximate search in one pass: the best slot of each of L buckets, then the top-k of those.

Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s", 2022. A neighbour is lost when a
better one shares its bucket. Slot i is in bucket i mod L with L odd, so that consecutive tokens do
not share a bucket, and tokens at the same offset of two segments do not: their keys are similar.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ..gathered import dots, keys_of
from ..view import Readable
from .kernels.cpu_scan import SCORE_BYTES as HOST_SCORE_BYTES
from .kernels.cpu_scan import odd_stride
from .kernels.score_blocks import SCORE_BYTES
from .policy import KERNELS, KernelChoice, KernelFailed, choose_kernel
from .protocol import Neighbours

logger = logging.getLogger(__name__)


def num_buckets_for(top_k: int, recall_target: float) -> int:
    """Buckets L for an expected recall of at least ``recall_target``.

    With neighbours spread at random a neighbour survives its k - 1 rivals with probability
    ``(1 - 1/L)^(k - 1)`` at least, hence ``L = 1 / (1 - r^(1 / (k - 1)))`` (Chern et al., section
    on recall).
    """
    if top_k == 1:
        return 1
    return math.ceil(1 / (1 - recall_target ** (1 / (top_k - 1))))


class BucketedSearch:
    """Neighbours with an expected recall of ``recall_target``, exact where the memory is small.

    ``policy.choose_kernel`` chooses how, by the device, its instructions, the slots in use and the
    number of queries. When it first chooses a kernel, the log says which one and why.

    Args:
        recall_target: expected share of the true neighbours, in (0, 1).
        score_bytes: bytes of scores and candidates that may live at once; None for what suits the
            device.
    """

    def __init__(self, recall_target: float = 0.95, score_bytes: int | None = None) -> None:
        self.recall_target = recall_target
        self.score_bytes = score_bytes
        self.kernel: KernelChoice | None = None
        """The last choice."""
        self._announced: set[str] = set()
        self._broken: set[str] = set()
        """Kernels that failed on this machine."""

    @torch.no_grad()
    def __call__(self, queries: Tensor, memory: Readable, top_k: int) -> Neighbours:
        buckets = odd_stride(max(top_k, num_buckets_for(top_k, self.recall_target)))
        choice = choose_kernel(queries, memory, top_k, buckets, self.recall_target)
        if choice.name in self._broken:
            choice = KernelChoice("torch", top_k, f"{choice.name} failed")
        if choice.name not in self._announced:
            self._announced.add(choice.name)
            logger.info("bucketed search: %s kernel (%s)", choice.name, choice.reason)
        self.kernel = choice
        on_host = queries.device.type == "cpu"
        room = self.score_bytes or (HOST_SCORE_BYTES if on_host else SCORE_BYTES)
        kernel = KERNELS[choice.name]
        try:
            found = kernel.run(queries, memory, choice.candidates, buckets, room)
        except KernelFailed as error:
            self._broken.add(choice.name)
            logger.warning("bucketed search continues in plain torch: %s", error)
            return self(queries, memory, top_k)
        return rescored(queries, memory, found, top_k) if kernel.rough else found


def rescored(queries: Tensor, memory: Readable, found: Neighbours, top_k: int) -> Neighbours:
    """The ``top_k`` best of candidates found by rough scores, by scores in fp32, best first."""
    slots, valid = found
    # Asking costs a wait on a GPU.
    counted = valid if queries.is_cuda or not valid.all() else None
    safe = slots if counted is None else slots.masked_fill(~valid, 0)
    scores = dots(queries.float(), keys_of(memory, safe, counted))
    order = scores.masked_fill_(~valid, -torch.inf).topk(top_k, dim=-1).indices
    return Neighbours(slots.gather(-1, order), valid.gather(-1, order))
