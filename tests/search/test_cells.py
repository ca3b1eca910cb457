"""The search of cells: sound, near its target, and the same whatever the search has seen before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers.memory import Memory, make_search
from memorizing_transformers.memory.search import cells
from memorizing_transformers.memory.search.cells import CellSearch
from memorizing_transformers.memory.search.kernels.cell_scan import CELL, NO_SLOT, Cells
from memorizing_transformers.memory.search.kernels.tree import leaves
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.memory.search.reference import reference_search
from memorizing_transformers.memory.view import MemoryView

HEADS, WIDTH, TOP_K = 2, 16, 8
RECALL = 0.85
"""Keys here are drawn, and few; how many cells suit a target was measured on trained ones."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells from the first few slots and queries on."""
    monkeypatch.setattr(cells, "LEAST_SLOTS", 1)
    monkeypatch.setattr(cells, "LEAST_QUERIES", 1)
    monkeypatch.setattr(cells, "LEAST_SCORES", 1)


def clustered(count: int, seed: int, rows: int = 2) -> Tensor:
    """Unit vectors (rows, G, count, D) around 64 centres that all seeds share."""
    centres = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed + 1)
    chosen = torch.randint(64, (rows, HEADS, count), generator=draw)
    noise = torch.randn(rows, HEADS, count, WIDTH, generator=draw)
    return F.normalize(centres[chosen] + 0.4 * noise, dim=-1)


def write(memory: Memory, count: int, seed: int) -> None:
    keys = clustered(count, seed, len(memory.written))
    memory.write(keys, keys.flip(-1))


def new_memory(size: int, written: int) -> Memory:
    memory = Memory(2, HEADS, size, WIDTH)
    memory.keys.fill_(torch.nan)
    if written:
        write(memory, written, 1)
    return memory


def assert_sound(slots: Tensor, valid: Tensor, memory: Memory) -> None:
    assert valid.all()
    assert (slots >= 0).all()
    assert (slots < memory.used[:, None, None, None]).all()
    assert (slots.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("written", [3000, 3001, 5000, 4096 + 4000, 20_000])
@pytest.mark.parametrize("size", [5000, 8192])
def test_finds_most_true_neighbours_best_first(size: int, written: int) -> None:
    memory, search = new_memory(size, written), CellSearch()
    queries = clustered(60, 7)
    slots, valid = search(queries, memory, TOP_K)
    assert_sound(slots, valid, memory)
    scores = (queries @ memory.keys.nan_to_num().mT).gather(-1, slots)
    assert (scores.diff(dim=-1) <= 1e-6).all()
    assert measured_recall(search, queries, memory, TOP_K) >= RECALL
    assert search.otherwise.kernel is None


def test_a_higher_target_finds_more() -> None:
    memory, queries = new_memory(16384, 16384), clustered(60, 7)
    found = [measured_recall(CellSearch(r), queries, memory, TOP_K) for r in (0.8, 0.9, 0.97)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_search_that_followed_the_ring_finds_what_a_new_one_finds() -> None:
    """What it finds depends on what the memory holds: else a resumed run would differ."""
    memory, search, queries = new_memory(4096, 0), CellSearch(), clustered(20, 7)
    for step in range(60):
        write(memory, 300, step)
        if step == 25:
            memory.reset(torch.tensor([True, False]))
        if step == 45:
            saved = {name: x.clone() for name, x in memory.tensors().items()}
            saved["keys"] = clustered(4096, 99)
            memory.load(saved)
        if step > 8:
            found, new = (s(queries, memory, TOP_K) for s in (search, CellSearch()))
            assert torch.equal(found.valid, new.valid)
            assert torch.equal(found.slots[new.valid], new.slots[new.valid]), step


def test_a_turn_of_the_ring_that_nobody_saw_is_noticed() -> None:
    memory, search, queries = new_memory(4096, 4096), CellSearch(), clustered(20, 7)
    search(queries, memory, TOP_K)
    write(memory, 4096, 2)
    found, new = (s(queries, memory, TOP_K) for s in (search, CellSearch()))
    assert torch.equal(found.slots, new.slots)


def test_a_place_without_a_key_is_never_found() -> None:
    """Where all keys are equal, the one that fills a cell up scores as they do."""
    memory = new_memory(4096, 0)
    keys = clustered(1, 1).expand(-1, -1, 4001, -1)
    memory.write(keys, keys)
    slots, _ = CellSearch()(clustered(20, 7), memory, TOP_K)
    assert (slots >= 0).all()


def test_pairs_written_again_are_found_anew() -> None:
    memory, search, queries = new_memory(4096, 4096), CellSearch(), clustered(20, 7)
    search(queries, memory, TOP_K)
    with memory.rewound(torch.full((2,), 1000)):
        keys = clustered(3096, 50)
        memory.write(keys, keys)
    found, new = (s(queries, memory, TOP_K) for s in (search, CellSearch()))
    assert torch.equal(found.slots, new.slots)


def test_a_query_finds_the_same_whatever_else_is_asked() -> None:
    memory, queries = new_memory(4096, 6000), clustered(64, 7)
    other = queries.clone()
    other[:, :, 32:] = clustered(32, 8)
    found, changed = (CellSearch()(x, memory, TOP_K).slots for x in (queries, other))
    assert torch.equal(found[:, :, :32], changed[:, :, :32])
    assert not torch.equal(found[:, :, 32:], changed[:, :, 32:])


def test_chunks_of_queries_change_nothing() -> None:
    memory, queries = new_memory(4096, 6000), clustered(64, 7)
    whole, parts = (CellSearch(0.9, room)(queries, memory, TOP_K) for room in (None, 100_000))
    assert torch.equal(whole.slots, parts.slots)


def test_each_row_and_head_finds_its_own() -> None:
    memory, queries = new_memory(4096, 6000), clustered(20, 7)
    both = CellSearch()(queries, memory, TOP_K).slots
    alone = Memory(1, HEADS, 4096, WIDTH)
    for name in ("keys", "values", "written"):
        setattr(alone, name, getattr(memory, name)[1:].clone())
    alone.bound = memory.bound[1:]
    assert torch.equal(both[1:], CellSearch()(queries[1:], alone, TOP_K).slots)
    view = MemoryView(memory, [1, 0, 1])
    seen = CellSearch()(queries[[1, 0, 1]], view, TOP_K).slots
    assert torch.equal(seen, both[[1, 0, 1]])


def test_short_rows_and_dropped_pairs_are_scanned() -> None:
    memory, queries = new_memory(4096, 6000), clustered(20, 7)
    memory.drop(torch.tensor([100, 0]))
    memory.reset(torch.tensor([False, True]))
    keys = clustered(5, 3)
    memory.write(keys, keys, torch.tensor([[False] * 5, [True] * 5]))
    found, truth = CellSearch(0.9)(queries, memory, TOP_K), reference_search(queries, memory, TOP_K)
    assert torch.equal(found.valid, truth.valid)
    row = torch.arange(2)[:, None, None, None].expand_as(found.slots)
    assert memory.valid()[row[found.valid], found.slots[found.valid]].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_keys_stored_with_fewer_bits_are_found(dtype: torch.dtype) -> None:
    memory = Memory(2, HEADS, 4096, WIDTH, dtype)
    write(memory, 6000, 1)
    assert measured_recall(CellSearch(), clustered(60, 7), memory, TOP_K) >= RECALL


@pytest.mark.parametrize("kind", ["equal", "zero", "not finite"])
def test_keys_of_any_kind_do_not_stop_it(kind: str) -> None:
    memory, queries = new_memory(4096, 4096), clustered(20, 7)
    memory.keys.copy_(
        {
            "equal": clustered(1, 1).expand(-1, -1, 4096, -1),
            "zero": torch.zeros(()),
            "not finite": clustered(4096, 1).masked_fill(torch.rand(4096, 1) < 0.1, torch.nan),
        }[kind]
    )
    slots, valid = CellSearch()(queries, memory, TOP_K)
    assert valid.all()
    assert ((slots >= 0) & (slots < 4096)).all()


def test_keys_without_structure_are_scanned() -> None:
    memory, queries = new_memory(8192, 8192), clustered(60, 7)
    memory.keys.copy_(F.normalize(torch.randn(memory.keys.shape), dim=-1))
    search = CellSearch()
    assert measured_recall(search, queries, memory, TOP_K) == 1
    assert search.otherwise.kernel is not None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13, 64, 100])
def test_a_tree_has_every_key_once_and_leaves_of_one_size(count: int) -> None:
    keys = clustered(count * 4, 5)[0, 0]
    order = leaves(keys, 4)
    assert order.shape == (count, 4)
    assert torch.equal(order.flatten().sort().values, torch.arange(count * 4))


def test_leaves_hold_keys_that_are_near() -> None:
    keys = clustered(4096, 5)[0, 0]
    within = keys[leaves(keys, 32)].var(1).mean()
    assert within < 0.5 * keys.var(0).mean()


def test_places_without_a_key_are_marked() -> None:
    keys = clustered(100, 5)[0, 0]
    made = Cells.of(keys, torch.arange(1000, 1100))
    assert made.slots.shape == (2, CELL)
    real = made.slots != NO_SLOT
    assert torch.equal(made.slots[real].sort().values, torch.arange(1000, 1100))
    assert torch.equal(made.keys[real], keys[made.slots[real] - 1000])


def test_the_trial_by_keys_holds_no_more_scores_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Cells.of(clustered(1000, 0)[0, 0], torch.arange(1000))
    most: list[int] = []
    topk = Tensor.topk

    def watched(self: Tensor, *args, **kwargs):
        most.append(self.numel())
        return topk(self, *args, **kwargs)

    whole = made.recall_of_keys(8, 2, 2**30)
    monkeypatch.setattr(Tensor, "topk", watched)
    assert made.recall_of_keys(8, 2, 4 * 5000) == pytest.approx(whole)
    assert 0.2 < whole < 1
    assert max(most) <= 5000


def test_few_queries_and_small_memories_are_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "LEAST_SLOTS", 2000)
    search, queries = CellSearch(), clustered(20, 7)
    memory = new_memory(4096, 1000)
    assert torch.equal(
        search(queries, memory, TOP_K).slots, make_search("exact")(queries, memory, TOP_K).slots
    )
    monkeypatch.setattr(cells, "LEAST_QUERIES", 21)
    memory = new_memory(4096, 4096)
    assert torch.equal(
        search(queries, memory, TOP_K).slots,
        make_search("bucketed")(queries, memory, TOP_K).slots,
    )
