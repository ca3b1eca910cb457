"""Batches that are made one step before they are asked for, ready to be copied to a GPU.

A copy from pinned memory does not make the host wait. A thread is enough: to read tokens takes a
few milliseconds. ``DataLoader``'s workers are processes, they draw from torch's random state, and
do not say which batch was handed out last, as an exact resume needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .batch import Batch

Make = Callable[[], Batch]


def pinned(batch: Batch) -> Batch:
    """The batch in memory that a GPU can copy from while the host goes on."""
    return Batch(*(tensor.pin_memory() for tensor in batch))


def _pinned(make: Make) -> Batch:
    return pinned(make())


def one_ahead(makes: Iterable[Make], device: torch.device) -> Generator[Batch]:
    """Yield what ``makes`` return, in order; while one is in use, a thread makes the next.

    What one of them raises is raised when its batch is asked for.

    Args:
        makes: each makes a batch.
        device: the GPU that the batches go to.
    """
    # A thread begins on the first GPU, and would pin memory for that one.
    with ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,)) as pool:
        last: Future[Batch] | None = None
        for make in makes:
            following = pool.submit(_pinned, make)
            if last is not None:
                yield last.result()
            last = following
        if last is not None:
            yield last.result()
