"""faiss behind the ring: wrap-around, resets, retirement, against the reference."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search.reference import reference_search

pytest.importorskip("faiss", reason="faiss is not installed")

from memorizing_transformers.memory.search import faiss_index as indexes

HEADS, WIDTH, TOP_K = 2, 8, 5
KINDS = ["flat", "ivf", "hnsw"]


class Built:
    """Every index that faiss was asked for; what is still there can be told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.references: list[weakref.ref[Any]] = []
        for name in ("IndexIVFFlat", "IndexHNSWFlat"):
            patch.setattr(indexes.faiss, name, self._noting(getattr(indexes.faiss, name)))

    def _noting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            index = make(*arguments)
            self.references.append(weakref.ref(index))
            return index

        return noted

    @property
    def living(self) -> list[Any]:
        return [index for reference in self.references if (index := reference()) is not None]

    @property
    def pairs(self) -> int:
        """Pairs in indexes that are still there, over all heads."""
        return sum(index.ntotal for index in self.living)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    return Built(monkeypatch)


def write(memory: Memory, count: int, mask: torch.Tensor | None = None) -> None:
    rows = memory.written.shape[0]
    memory.write(*torch.randn(2, rows, HEADS, count, WIDTH), mask)


def recall(found: Neighbours, expected: Neighbours) -> float:
    hit = (found.slots[..., None, :] == expected.slots[..., :, None]) & found.valid[..., None, :]
    return float(hit.any(-1)[expected.valid].float().mean()) if expected.valid.any() else 1.0


def assert_agrees(search: indexes.FaissSearch, memory: Memory, least: float) -> None:
    """As many neighbours as there are, none of them expired, nearly all true."""
    queries = torch.randn(memory.written.shape[0], HEADS, 31, WIDTH)
    found, expected = (f(queries, memory, TOP_K) for f in (search, reference_search))
    assert torch.equal(found.valid, expected.valid)
    assert (found.slots[found.valid] >= 0).all()
    row = torch.arange(len(memory.fill))[:, None, None, None].expand_as(found.slots)
    assert memory.valid()[row[found.valid], found.slots[found.valid]].all()
    assert recall(found, expected) >= least
    # A pair that left the ring would show as another one's slot, out of order or twice.
    index = found.slots.masked_fill(~found.valid, 0)
    keys = memory.keys.nan_to_num()
    scores = (queries @ keys.mT).gather(-1, index).masked_fill(~found.valid, -1e9)
    torch.testing.assert_close(scores, scores.sort(-1, descending=True).values)
    distinct = torch.where(found.valid, found.slots, -1 - torch.arange(TOP_K)).sort(-1).values
    assert (distinct.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [509, 1024])
def test_follows_the_ring(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing, wrapping around, one row reset, padded rows, more than a ring at once."""
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind, 0.95)
    least = 1.0 if kind == "flat" else 0.9
    memory = Memory(2, HEADS, size, WIDTH)
    memory.keys.fill_(torch.nan)
    assert_agrees(search, memory, 1.0)
    for step in range(40):
        write(
            memory,
            63,
            torch.tensor([[True] * 63, [True] * (step % 63 + 1) + [False] * (62 - step % 63)]),
        )
        if step in (7, 20):
            memory.reset(torch.tensor([step == 7, step == 20]))
            write(memory, 3)
        if step % 3 == 0 or step > 35:
            assert_agrees(search, memory, least)
    write(memory, 3 * size)
    assert_agrees(search, memory, least)
    other = Memory(2, HEADS, size, WIDTH)
    write(other, 200)
    memory.load(other.tensors())
    assert_agrees(search, memory, least)


@pytest.mark.parametrize("kind", KINDS)
def test_follows_what_is_dropped_and_written_over(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind, 0.95)
    memory = Memory(2, HEADS, 509, WIDTH)
    for _ in range(30):
        write(memory, 63)
        memory.drop(torch.tensor([63 if memory.fill[0] > 300 else 0, 7]))
        assert_agrees(search, memory, 1.0 if kind == "flat" else 0.9)
    with memory.rewound(memory.written - torch.tensor([200, 0])):
        write(memory, 200, torch.tensor([[True] * 200, [False] * 200]))
    assert_agrees(search, memory, 1.0 if kind == "flat" else 0.9)


def test_a_reset_that_wrote_as_much_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch("ivf", 0.95)
    memory = Memory(1, HEADS, 512, WIDTH)
    for _ in range(2):
        memory.reset()
        write(memory, 300)
        assert_agrees(search, memory, 0.9)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_nothing_is_indexed_before_a_query_can_tell_how_hard_to_look(
    kind: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a resume. Keys would tell too little: every key has itself for a neighbour."""
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind, 0.95)
    memory = Memory(1, HEADS, 1024, WIDTH)
    write(memory, 1024)
    assert_agrees(search, memory, 1.0)
    assert not built.living
    assert_agrees(search, memory, 0.9)
    assert built.living


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_indexes_retire_and_never_outnumber_the_ring(
    kind: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind)
    memory = Memory(1, HEADS, 512, WIDTH)
    for _ in range(30):
        write(memory, 50)
        search(torch.randn(1, HEADS, 4, WIDTH), memory, TOP_K)
        assert len(built.living) <= HEADS * (indexes.RUNS + 1)
        assert built.pairs <= HEADS * 512 * (indexes.RUNS + 1) / indexes.RUNS
    assert len(built.living) >= HEADS * (indexes.RUNS - 1)
    assert len(built.references) > 2 * len(built.living)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_costs_nothing_that_grows(
    kind: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key of the old document is read again, and its indexes are gone."""
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind)
    memory, queries = Memory(1, HEADS, 512, WIDTH), torch.randn(1, HEADS, 4, WIDTH)
    for _ in range(9):
        write(memory, 100)
        search(queries, memory, TOP_K)
    assert (len(built.living) > 3 * HEADS) == (kind != "flat")
    read: list[int] = []
    keys = indexes.RingHead.keys

    def counted(head: indexes.RingHead, first: int, last: int) -> Any:
        read.append(last - first)
        return keys(head, first, last)

    monkeypatch.setattr(indexes.RingHead, "keys", counted)
    memory.reset()
    write(memory, 3)
    search(queries, memory, TOP_K)
    assert read == [3] * HEADS
    assert not built.living


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_document_of_a_million_tokens_holds_no_more_than_the_ring(
    kind: str, built: Built
) -> None:
    search = indexes.FaissSearch(kind)
    memory = Memory(1, 1, 16384, 4)
    sizes = []
    for _ in range(1_000_000 // 4000):
        memory.write(*torch.randn(2, 1, 1, 4000, 4))
        search(torch.randn(1, 1, 16, 4), memory, TOP_K)
        sizes.append(built.pairs)
    assert int(memory.written) == 1_000_000
    assert 16384 / 2 < max(sizes) <= 16384 * (indexes.RUNS + 1) / indexes.RUNS
    queries = torch.randn(1, 1, 64, 4)
    assert recall(search(queries, memory, TOP_K), reference_search(queries, memory, TOP_K)) >= 0.9


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_indexes_go_with_their_memory(
    kind: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "SHORTEST_RUN", 64)
    search = indexes.FaissSearch(kind)
    memory = Memory(1, HEADS, 512, WIDTH)
    for _ in range(3):
        write(memory, 100)
        search(torch.randn(1, HEADS, 4, WIDTH), memory, TOP_K)
    assert built.living
    del memory
    assert not built.living
