"""Cells that have fewer keys than places: what fills them up is never found, and hides no key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers.memory import Memory, attend
from memorizing_transformers.memory.search import cells
from memorizing_transformers.memory.search.cells import CellSearch
from memorizing_transformers.memory.search.kernels.cell_scan import CELL, Cells

SIZE, WIDTH = 4096, 16
SPAN = SIZE // cells.SPANS


def clustered(rows: int, count: int, seed: int) -> Tensor:
    """Unit vectors (rows, 1, count, D) around 16 centres that all seeds share."""
    centres = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(16, (rows, 1, count), generator=draw)
    noise = torch.randn(rows, 1, count, WIDTH, generator=draw)
    return F.normalize(centres[chosen] + 0.2 * noise, dim=-1)


def keys_of_kind(kind: str, rows: int, count: int, more: int) -> Tensor:
    """Keys (rows, 1, count + more, D), of which the last ``more`` are in a span of their own."""
    keys = clustered(rows, count + more, 1)
    if kind == "equal in the last span":
        keys[:, :, count:] = keys[:, :, count : count + 1]
    if kind == "equal":
        keys[:] = keys[:, :, :1]
    return keys


KINDS = ["different", "equal in the last span", "equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("more", range(1, 8))
def test_all_cells_together_find_the_true_neighbours(kind: str, top_k: int, more: int) -> None:
    keys = keys_of_kind(kind, 1, 10 * CELL + more, more)[0, 0]
    made = Cells.of(keys[:-more], torch.arange(len(keys) - more), spare=more)
    made = made.with_more(Cells.of(keys[-more:], torch.arange(len(keys) - more, len(keys))))
    queries = torch.cat([clustered(1, 50, 2)[0, 0], -keys[-more:]])
    slots = made.search(queries, top_k, len(made.slots))
    assert (slots >= 0).all()
    assert (slots.sort(-1).values.diff(dim=-1) > 0).all()
    scores = queries @ keys.T
    assert torch.allclose(scores.gather(1, slots), scores.topk(top_k).values, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("size", [SIZE, SIZE + 5])
@pytest.mark.parametrize("more", range(1, 8))
def test_a_row_reads_pairs_of_its_own_alone(
    kind: str, top_k: int, size: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LEAST_SLOTS", "LEAST_QUERIES", "LEAST_SCORES", "KEYS_FIND"):
        monkeypatch.setattr(cells, name, 0)
    keys = keys_of_kind(kind, 2, 5 * SPAN if size == SIZE else size + 100, more)
    memory, search = Memory(2, 1, size, WIDTH), CellSearch()
    for values in (memory.values, memory.keys):
        values.fill_(1000.0)  # where nothing was written
    memory.write(keys, torch.zeros_like(keys))
    memory.values[0].fill_(1000.0)
    queries = 8 * torch.cat([clustered(2, 50, 2), keys[:, :, -more:], -keys[:, :, -more:]], 2)
    found = search(queries, memory, top_k)
    assert search.otherwise.kernel is None
    assert found.valid.all()
    assert ((found.slots >= 0) & (found.slots < memory.max_fill)).all()
    assert attend(queries, memory, found).output[1].abs().max() == 0


def test_what_fills_a_cell_up_does_not_change_how_it_looks() -> None:
    """The mean of two opposite keys looks like neither."""
    key = F.normalize(torch.ones(WIDTH), dim=0)
    others = 0.5 * clustered(1, 4 * CELL, 1)[0, 0]
    others -= (others @ key)[:, None] * key
    made = Cells.of(others, torch.arange(len(others)), spare=2)
    made = made.with_more(Cells.of(torch.stack([key, -key]), torch.tensor([500, 501])))
    found = made.search(torch.stack([key, -key]), 1, 1)
    assert found.tolist() == [[500], [501]]


@pytest.mark.parametrize("opposite", [False, True])
def test_a_half_without_a_key_changes_nothing(opposite: bool) -> None:
    key = clustered(1, 1, 1)[0, 0]
    made = Cells.of(key, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(made.halves[:-1].T, key.expand(2, -1))
    asked = -key if opposite else key
    assert made.search(asked, 1, 1).item() == 0


def test_fewer_keys_than_were_asked_for_are_not_valid() -> None:
    key = clustered(1, 1, 1)[0, 0]
    found = Cells.of(key, torch.tensor([7])).search(key, 3, 1)
    assert found.tolist() == [[7, -1, -1]]
