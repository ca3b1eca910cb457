"""The report's numbers and texts as base64, for a page that carries its own data.

Base64 of compressed bytes is small, and has no letter that could end a script or begin a tag: what
a document says cannot reach the page's markup. Arrays travel as byte planes, the low bytes of all
numbers first, which compress far better than the numbers one after the other. A browser undoes it
with ``DecompressionStream``.
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .report import Report
from .trace import Trace

BITS_STEP = 1 / 1024
"""Losses are rounded to this many bits in the page; 64 bits and more are shown as 64."""
SHARE_STEP = 1 / 255
"""Weights and shares are rounded to this in the page."""


def planes(array: NDArray[Any], width: int) -> bytes:
    """Unsigned integers of ``width`` bytes, little end first, plane by plane."""
    flat = np.ascontiguousarray(array).reshape(-1).astype("<u4")
    return flat.view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()


def blob(content: bytes) -> str:
    """Compressed, in base64."""
    # No time stamp: the same report gives the same file.
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode("ascii")


def as_share(array: NDArray[Any]) -> NDArray[Any]:
    """Numbers of [0, 1] as bytes; what is more than nothing stays so."""
    scaled = np.round(np.clip(array, 0, 1) / SHARE_STEP)
    return np.where(array > 0, np.maximum(scaled, 1), 0)


def retrieval_blobs(trace: Trace, top: int, wanted: NDArray[np.bool_]) -> dict[str, str]:
    """What one reading retrieved.

    Args:
        trace: the reading.
        top: neighbours of each head that are kept.
        wanted: (L,) the tokens whose retrievals are kept.
    """
    distances = np.where(wanted, trace.distances()[:, :, :top], 0)
    weights = np.where(wanted, trace.weights[:, :, :top], 0.0)
    return {
        f"distances-{trace.name}": blob(planes(distances, 4)),
        f"weights-{trace.name}": blob(planes(as_share(weights), 1)),
        f"shares-{trace.name}": blob(planes(as_share(trace.shares), 1)),
    }


def size_of(blobs: dict[str, str]) -> int:
    """Bytes that blobs take in the page."""
    return sum(len(content) for content in blobs.values())


def all_retrievals(report: Report, room: int) -> tuple[dict[str, str], int, int]:
    """As many retrievals as fit, the heaviest first.

    Where even one neighbour a head does not fit for every token, the tokens that gained or lost
    least go without.

    Args:
        report: the report.
        room: bytes that they may take.

    Returns:
        the blobs, the neighbours kept of each head, and the tokens that have theirs.
    """
    most = report.readings[0].positions.shape[2]
    length = len(report.tokens)
    everyone = np.ones(length, dtype=bool)
    for top in range(most, 0, -1):
        blobs = {
            k: v for t in report.readings for k, v in retrieval_blobs(t, top, everyone).items()
        }
        if size_of(blobs) <= room:
            return blobs, top, length
    order = np.argsort(-np.abs(np.stack([report.gain(t) for t in report.readings])).max(0))
    kept = length
    while kept and size_of(blobs) > room:
        # A tenth below the room in proportion, since what remains compresses less well.
        kept = max(0, int(kept * 0.9 * min(1, room / size_of(blobs))))
        wanted = np.zeros(length, dtype=bool)
        wanted[order[:kept]] = True
        blobs = {k: v for t in report.readings for k, v in retrieval_blobs(t, 1, wanted).items()}
    return blobs, 1, kept


def text_blobs(report: Report) -> dict[str, str]:
    """The document, its tokens and their losses."""
    tokens = report.tokens
    blobs = {
        "text": blob(tokens.text.encode("utf-8")),
        "lengths": blob(planes(tokens.utf16_lengths(), 4)),
        "ids": blob(planes(tokens.ids, 4)),
    }
    for trace in report.traces:
        steps = np.clip(np.round(trace.bits / BITS_STEP), 0, 2**16 - 1)
        blobs[f"bits-{trace.name}"] = blob(planes(steps, 2))
        if trace.copied is not None:
            blobs[f"copied-{trace.name}"] = blob(planes(as_share(trace.copied), 1))
        if trace.repeated is not None:
            blobs[f"repeated-{trace.name}"] = blob(planes(trace.repeated, 4))
    return blobs


def facts_blob(facts: dict[str, Any]) -> str:
    """A JSON object."""
    return blob(json.dumps(facts).encode("utf-8"))
