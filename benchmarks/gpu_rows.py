"""What the parts of ``gpu.py`` share: sizes, times, and rows of what failed or fell back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import memorizing_transformers

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of what is measured; the defaults are those of the paper's larger model."""

    rows: int = 32
    heads: int = 8
    segment: int = 512
    width: int = 128
    layers: int = 12
    d_model: int = 1024
    vocabulary: int = 32_000
    top_k: int = 32
    slots: tuple[int, ...] = (8_192, 65_536, 262_144)
    seconds: float = 4.0
    """Time for one figure, after two warm-up runs."""


TINY = Shape(2, 2, 16, 16, 2, 32, 64, 4, (64, 128), 0.05)
"""For a rehearsal on a CPU."""


def outcome(error: Exception) -> str:
    """What a row says in place of its last figure."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    said = str(error).strip().splitlines()
    return f"failed: {said[0] if said else type(error).__name__}"


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """The warnings that the package logs within: a fallback would be timed as what it replaces."""
    said: list[str] = []

    def note(record: logging.LogRecord) -> None:
        if record.getMessage() not in said:  # each layer may say it
            said.append(record.getMessage())

    handler = logging.Handler(logging.WARNING)
    handler.emit = note  # type: ignore[method-assign]
    logger = logging.getLogger(memorizing_transformers.__name__)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call: at least three, and as many as fit into ``seconds``."""
    for _ in range(2):
        call()
    wait(device)
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < 50):
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return found
