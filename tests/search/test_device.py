"""What searches do on a device that is not a CPU, on tensors of a CPU, at awkward block sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.memory.search.kernels.score_blocks import score_blocks
from memorizing_transformers.memory.search.kernels.torch_buckets import torch_buckets
from memorizing_transformers.memory.search.reference import reference_search

HEADS, WIDTH = 2, 8
ROOMS = [1, 400, 3000, 20_000, 150_000, 2**26]
"""Bytes of scores: from a slot of a row at a time to all rows at once."""
FILLS = [
    # slots, pairs written, pairs dropped
    pytest.param(257, [257, 100, 3], [0, 0, 0], id="prime, some rows short"),
    pytest.param(1009, [3000, 700, 0], [400, 0, 0], id="wrapped, dropped, one row empty"),
    pytest.param(64, [64, 64, 64], [0, 60, 64], id="full, nearly all dropped"),
    pytest.param(16, [0, 0, 0], [0, 0, 0], id="nothing stored"),
]


def filled(size: int, written: list[int], dropped: list[int], dtype: torch.dtype) -> Memory:
    """A memory whose unused slots hold NaN and whose dropped keys would be the best."""
    memory = Memory(len(written), HEADS, size, WIDTH, dtype)
    rubbish = memory.keys if memory.key_scales is None else memory.key_scales
    rubbish.fill_(torch.nan)
    longest = max(*written, 1)
    keys = torch.randn(len(written), HEADS, longest, WIDTH)
    oldest = (torch.tensor(written) - size).clamp(min=0) + torch.tensor(dropped)
    keys = keys * torch.where(torch.arange(longest) < oldest[:, None], 50.0, 1.0)[:, None, :, None]
    memory.write(keys, keys, torch.arange(longest) < torch.tensor(written)[:, None])
    memory.drop(torch.tensor(dropped))
    return memory


def scores_of(queries: Tensor, memory: Memory) -> Tensor:
    """(B, G, Q, M) every score, minus infinity where there is nothing to retrieve."""
    scores = queries @ memory.keys_at(...).nan_to_num().mT
    return scores.masked_fill(~memory.valid()[:, None, None], -torch.inf)


def found_scores(queries: Tensor, memory: Memory, found: Neighbours) -> Tensor:
    scores = scores_of(queries, memory).gather(-1, found.slots.masked_fill(~found.valid, 0))
    return scores.masked_fill(~found.valid, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(("size", "written", "dropped"), FILLS)
@pytest.mark.parametrize(("count", "top_k"), [(63, 5), (1, 1), (7, 16)])
def test_exact_search_finds_what_the_reference_finds(
    count: int,
    top_k: int,
    size: int,
    written: list[int],
    dropped: list[int],
    room: int,
    dtype: torch.dtype,
) -> None:
    memory = filled(size, written, dropped, dtype)
    queries = torch.randn(3, HEADS, count, WIDTH)
    found = ExactSearch(room)._on_device(queries, memory, top_k)
    expected = reference_search(queries, memory, top_k)
    assert torch.equal(found.valid, expected.valid)
    ours, theirs = (found_scores(queries, memory, x) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)
    distinct = torch.where(found.valid, found.slots, -1 - torch.arange(top_k)).sort(-1).values
    assert (distinct.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(("size", "written", "dropped"), FILLS)
def test_bucketed_search_gives_the_best_of_every_bucket(
    size: int, written: list[int], dropped: list[int], room: int
) -> None:
    """All buckets are asked for, so that the truth is known: each gives its best member."""
    buckets = 13
    memory = filled(size, written, dropped, torch.float32)
    queries = torch.randn(3, HEADS, 21, WIDTH)
    found = torch_buckets(queries, memory, buckets, buckets, room)
    scores = scores_of(queries, memory)
    best = torch.stack([scores[..., i::buckets].amax(-1) for i in range(buckets)], -1)
    expected = best.sort(-1, descending=True).values
    torch.testing.assert_close(found_scores(queries, memory, found), expected)
    assert torch.equal(found.valid, expected > -torch.inf)


@pytest.mark.parametrize("multiple", [1, 7, 64])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("chosen", [slice(None), slice(1, 3), slice(0, 1), slice(2, 2)], ids=str)
def test_blocks_are_the_score_matrix_cut_in_pieces(chosen: slice, room: int, multiple: int) -> None:
    """Each chosen row's slots once and in order, other rows never, and no block beyond its room."""
    memory = filled(1009, [500, 90, 311], [0, 40, 0], torch.float32)
    queries = torch.randn(3, HEADS, 5, WIDTH)
    expected = scores_of(queries, memory)
    seen = torch.zeros(3, memory.max_fill, dtype=torch.int64)
    for rows, start, scores in score_blocks(queries, memory, room, multiple, chosen):
        stop = start + scores.shape[-1]
        seen[rows, start:stop] += 1
        torch.testing.assert_close(scores, expected[rows, ..., start:stop])
        assert stop in memory.bounds or scores.shape[-1] % multiple == 0
        least = 4 * HEADS * 5 * multiple  # one row's smallest block
        assert 4 * scores.numel() <= max(room, least)
    assert memory.max_fill == 500
    wanted = torch.zeros_like(seen)
    wanted[chosen] = 1
    assert torch.equal(seen, wanted)


def test_what_counts_is_asked_once_for_all_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each time is a pass over the ages of all rows."""
    memory = Memory(4, 2, 300, 16)
    pairs = torch.randn(2, 4, 2, 200, 16)
    memory.write(*pairs, torch.arange(200) < torch.tensor([200, 0, 3, 150])[:, None])
    queries = torch.randn(4, 2, 5, 16)
    whole = torch_buckets(queries, memory, 8, 65, 2**30)
    asked: list[int | None] = []
    valid = Memory.valid
    monkeypatch.setattr(Memory, "valid", lambda *of: asked.append(of[-1]) or valid(*of))
    parts = torch_buckets(queries, memory, 8, 65, 1)
    assert asked == [200]
    assert torch.equal(parts.valid, whole.valid)
    assert torch.equal(parts.slots[parts.valid], whole.slots[whole.valid])
