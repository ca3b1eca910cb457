"""The automatic choice and the measured recall."""

from __future__ import annotations

import logging

import pytest
import torch

from memorizing_transformers.memory import Memory, Neighbours, make_search
from memorizing_transformers.memory.search import auto
from memorizing_transformers.memory.search.auto import EXACT_UP_TO, SCAN_UP_TO, choose_search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.memory.search.reference import reference_search


@pytest.mark.parametrize(
    ("device", "size", "name"),
    [
        ("cpu", EXACT_UP_TO["cpu"], "exact"),
        ("cpu", EXACT_UP_TO["cpu"] + 1, "bucketed"),
        ("cuda", 65536, "bucketed"),
        ("cuda", SCAN_UP_TO + 1, "bucketed"),
    ],
)
def test_the_choice_follows_device_and_size(device: str, size: int, name: str) -> None:
    choice = choose_search(device, size, rows=2, heads=8, queries=64)
    assert choice.name == name
    assert f"2 rows x 8 heads x {size} slots on {device}" in choice.reason


def test_a_memory_too_large_to_scan_gets_an_index() -> None:
    pytest.importorskip("faiss")
    assert choose_search("cpu", SCAN_UP_TO + 1, 1, 1, 64).name == "faiss"


@pytest.mark.parametrize(
    ("size", "queries", "fast_int8", "name"),
    [
        (16384, 2048, False, "cells"),
        (16384, 1024, False, "exact"),
        (65536, 512, False, "cells"),
        (65536, 256, False, "bucketed"),
        (65536, 4096, True, "bucketed"),
        (SCAN_UP_TO + 1, 4096, False, "faiss"),
    ],
)
def test_many_queries_on_a_cpu_without_int8_get_cells(
    size: int, queries: int, fast_int8: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(auto, "has_fast_int8", lambda: fast_int8)
    monkeypatch.setitem(EXACT_UP_TO, "cpu", 32768)
    assert choose_search("cpu", size, 2, 8, queries).name == name
    assert choose_search("cuda", size, 2, 8, queries).name != "cells"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    search = make_search("auto")
    memory = Memory(1, 2, 32, 8)
    memory.write(*torch.randn(2, 1, 2, 32, 8))
    queries = torch.randn(1, 2, 5, 8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = search(queries, memory, 4)
    assert torch.equal(found.slots, reference_search(queries, memory, 4).slots)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "memory search: exact"
    ]


def test_recall_is_measured() -> None:
    memory = Memory(2, 2, 64, 8)
    memory.write(*torch.randn(2, 2, 2, 50, 8))
    memory.reset(torch.tensor([False, True]))
    queries = torch.randn(2, 2, 40, 8)

    def half(queries: torch.Tensor, memory: Memory, top_k: int) -> Neighbours:
        slots, valid = reference_search(queries, memory, 2 * top_k)
        return Neighbours(slots[..., ::2], valid[..., ::2])

    assert measured_recall(reference_search, queries, memory, 8) == 1.0
    assert measured_recall(half, queries, memory, 8, sample=10) == pytest.approx(0.5)
    memory.reset()
    assert measured_recall(reference_search, queries, memory, 8) == 1.0
