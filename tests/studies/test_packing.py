"""What is packed comes back, and as much of it as there is room for."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest
from examples import report_on, small_model
from hostile import HOSTILE
from numpy.typing import NDArray

from memorizing_studies.inspection.packing import (
    BITS_STEP,
    SHARE_STEP,
    all_retrievals,
    blob,
    planes,
    size_of,
    text_blobs,
)
from memorizing_studies.inspection.report import Report


def unpacked(content: str, width: int) -> NDArray[np.int64]:
    """The numbers of a blob."""
    raw = np.frombuffer(gzip.decompress(base64.b64decode(content)), dtype=np.uint8)
    return (raw.reshape(width, -1).astype(np.int64) << 8 * np.arange(width)[:, None]).sum(0)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_on(HOSTILE * 3, small_model(layers=[0, 1]), (32, 64))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_planes_come_back(width: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 2 ** (8 * width), (3, 5, 7))
    assert np.array_equal(unpacked(blob(planes(numbers, width)), width), numbers.ravel())


def test_the_text_and_its_losses_come_back(report: Report) -> None:
    blobs = text_blobs(report)
    assert gzip.decompress(base64.b64decode(blobs["text"])).decode() == report.tokens.text
    lengths = unpacked(blobs["lengths"], 4)
    raw = report.tokens.text.encode("utf-16-le")
    ends = np.cumsum(lengths) * 2
    pieces = [raw[a:b].decode("utf-16-le") for a, b in zip([0, *ends], ends, strict=False)]
    assert pieces == report.pieces
    assert np.array_equal(unpacked(blobs["ids"], 4), report.tokens.ids)
    for trace in report.traces:
        bits = unpacked(blobs[f"bits-{trace.name}"], 2) * BITS_STEP
        assert np.allclose(bits, trace.bits, atol=BITS_STEP)


def test_retrievals_come_back(report: Report) -> None:
    blobs, top, kept = all_retrievals(report, 10**9)
    assert (top, kept) == (3, len(report.tokens))
    for trace in report.readings:
        distances = unpacked(blobs[f"distances-{trace.name}"], 4).reshape(trace.positions.shape)
        assert np.array_equal(distances, trace.distances())
        weights = unpacked(blobs[f"weights-{trace.name}"], 1).reshape(trace.weights.shape)
        assert np.allclose(weights * SHARE_STEP, trace.weights, atol=SHARE_STEP)
        assert np.array_equal(weights > 0, trace.weights > 0)
        shares = unpacked(blobs[f"shares-{trace.name}"], 1).reshape(trace.shares.shape)
        assert np.allclose(shares * SHARE_STEP, trace.shares, atol=SHARE_STEP)


def test_little_room_keeps_the_heaviest_of_the_tokens_that_changed_most(report: Report) -> None:
    whole = size_of(all_retrievals(report, 10**9)[0])
    blobs, top, kept = all_retrievals(report, int(whole * 0.8))
    assert size_of(blobs) <= whole * 0.8
    assert (top, kept) == (2, len(report.tokens))
    blobs, top, kept = all_retrievals(report, whole // 6)
    assert size_of(blobs) <= whole // 6
    assert top == 1
    assert 0 < kept < len(report.tokens)
    change = np.maximum(*(np.abs(report.gain(trace)) for trace in report.readings))
    trace = report.readings[-1]
    distances = unpacked(blobs[f"distances-{trace.name}"], 4).reshape(2, 4, 1, -1)
    has = distances.any((0, 1, 2))
    could = trace.positions[0, 0, 0] >= 0
    assert change[has].min() >= change[could & ~has].max()
    assert np.array_equal(distances[..., has], trace.distances()[:, :, :1, has])
    assert all_retrievals(report, -5)[1:] == (1, 0)
