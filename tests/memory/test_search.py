"""Every search against the reference, at awkward sizes and over slots that hold rubbish."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers.memory import SEARCHES, Memory, Neighbours, Search, make_search
from memorizing_transformers.memory.search import policy
from memorizing_transformers.memory.search.bucketed import BucketedSearch, num_buckets_for
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.memory.search.kernels import cpu_scan as host
from memorizing_transformers.memory.search.kernels.top_k import largest
from memorizing_transformers.memory.search.reference import reference_search

HEADS, WIDTH = 2, 8
EXACT = {
    "exact": ExactSearch(),
    "exact, blocks smaller than k": ExactSearch(score_bytes=3000),
    "exact, a row at a time": ExactSearch(score_bytes=30_000),
}
APPROXIMATE = {
    "bucketed": BucketedSearch(0.9),
    "bucketed, many blocks": BucketedSearch(0.9, score_bytes=3000),
}
SIZES = [
    # slots, pairs written to each row, queries, neighbours
    pytest.param(16, [0, 0], 5, 4, id="nothing stored"),
    pytest.param(16, [3, 0], 5, 4, id="fewer than k stored, one row empty"),
    pytest.param(257, [257, 100], 63, 32, id="prime M, N=63"),
    pytest.param(1009, [3000, 700], 7, 5, id="wide and wrapped"),
    pytest.param(8, [8, 8], 1, 8, id="k is everything"),
    pytest.param(100, [64, 1], 3, 1, id="k is one"),
]


def fill_rows(size: int, written: list[int], poison: bool = True) -> Memory:
    """A memory whose unused slots hold NaN."""
    memory = Memory(len(written), HEADS, size, WIDTH)
    if poison:
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)
    longest = max(*written, 1)
    pairs = torch.randn(2, len(written), HEADS, longest, WIDTH)
    memory.write(*pairs, torch.arange(longest) < torch.tensor(written)[:, None])
    return memory


def true_scores(queries: torch.Tensor, memory: Memory, found: Neighbours) -> torch.Tensor:
    """The inner products of queries and what they found, minus infinity where they found none."""
    index = found.slots.masked_fill(~found.valid, 0)
    scores = (queries @ memory.keys.transpose(-1, -2)).gather(-1, index)
    return scores.masked_fill(~found.valid, -torch.inf)


def assert_sound(found: Neighbours, memory: Memory, top_k: int) -> None:
    """As many neighbours as there can be, each a slot in use, none twice."""
    expected = memory.fill.clamp(max=top_k)[:, None, None]
    assert found.slots.shape[-1] == top_k
    assert (found.valid.sum(-1) == expected).all()
    assert (found.slots[found.valid] >= 0).all()
    row = torch.arange(len(memory.fill))[:, None, None, None].expand_as(found.slots)
    assert memory.valid()[row[found.valid], found.slots[found.valid]].all()
    distinct = torch.where(found.valid, found.slots, -1 - torch.arange(top_k)).sort(-1).values
    assert (distinct.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("size", "written", "count", "top_k"), SIZES)
def test_exact_search_finds_what_the_reference_finds(
    size: int, written: list[int], count: int, top_k: int, name: str
) -> None:
    memory = fill_rows(size, written)
    queries = torch.randn(2, HEADS, count, WIDTH)
    found, expected = EXACT[name](queries, memory, top_k), reference_search(queries, memory, top_k)
    assert_sound(found, memory, top_k)
    assert torch.equal(found.valid, expected.valid)
    # Two keys may score alike, so scores and not slots are compared, best first.
    torch.testing.assert_close(
        true_scores(queries, memory, found), true_scores(queries, memory, expected)
    )


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize(("size", "written", "count", "top_k"), SIZES)
def test_approximate_search_returns_sound_neighbours_best_first(
    size: int, written: list[int], count: int, top_k: int, name: str
) -> None:
    memory = fill_rows(size, written)
    queries = torch.randn(2, HEADS, count, WIDTH)
    found = APPROXIMATE[name](queries, memory, top_k)
    assert_sound(found, memory, top_k)
    scores = true_scores(queries, memory, found)
    assert torch.equal(scores, scores.sort(-1, descending=True).values)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_named_search_is_sound_and_reaches_its_recall(name: str) -> None:
    memory = fill_rows(509, [2000, 300])
    queries = torch.randn(2, HEADS, 63, WIDTH)
    found = make_search(name, recall_target=0.9)(queries, memory, 8)
    assert_sound(found, memory, 8)
    assert recall(found, reference_search(queries, memory, 8)) >= 0.88


@pytest.mark.parametrize("dropped", [[200, 0], [509, 290], [480, 300], [1, 297]], ids=str)
@pytest.mark.parametrize("way", ["at once", "head by head", "in int8"])
@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_finds_what_was_dropped(
    name: str, way: str, dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dropped keys are the best by far, and the others are found as if they were alone."""
    if way != "at once":
        monkeypatch.setattr(host, "AT_ONCE", 0)
        monkeypatch.setattr(policy, "ROUGH_SLOTS", 0)
    if way == "in int8":
        monkeypatch.setattr(policy, "QUANTIZED_SLOTS", 0)
        monkeypatch.setattr(policy, "QUANTIZED_QUERIES", 0)
        monkeypatch.setattr(policy, "has_fast_int8", lambda: True)
    memory = fill_rows(509, [2000, 300])
    queries = torch.randn(2, HEADS, 63, WIDTH)
    numbers = memory.written[:, None] - 1 - memory.age()
    first = memory.written - memory.fill + torch.tensor(dropped)
    gone = memory.valid() & (numbers < first[:, None])
    memory.keys.mul_(torch.where(gone, 100.0, 1.0)[:, None, :, None])
    search = make_search(name, recall_target=0.9)
    search(queries, memory, 8)  # an index has seen them all
    memory.drop(torch.tensor(dropped))
    assert not memory.valid()[gone].any()
    found = search(queries, memory, 8)
    assert_sound(found, memory, 8)
    assert recall(found, reference_search(queries, memory, 8)) >= 0.88


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_search_changes_nothing_and_scores_in_fp32(name: str, dtype: torch.dtype) -> None:
    memory = Memory(1, HEADS, 64, WIDTH, dtype)
    memory.write(*torch.randn(2, 1, HEADS, 50, WIDTH))
    before = {key: tensor.clone() for key, tensor in memory.tensors().items()}
    queries = torch.randn(1, HEADS, 9, WIDTH)
    found = make_search(name, recall_target=0.999)(queries, memory, 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in memory.tensors().items())
    in_fp32 = Memory(1, HEADS, 64, WIDTH)
    in_fp32.write(*[memory.keys_at(...)[:, :, :50]] * 2)
    assert torch.equal(found.slots, reference_search(queries, in_fp32, 4).slots)


def recall(found: Neighbours, expected: Neighbours) -> float:
    """Share of the true neighbours among those found."""
    hit = (found.slots[..., None, :] == expected.slots[..., :, None]) & found.valid[..., None, :]
    return float(hit.any(-1)[expected.valid].float().mean())


@pytest.mark.parametrize("score_bytes", [2**26, 2**20], ids=["one block", "many blocks"])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
def test_bucketed_search_reaches_its_recall_and_is_no_exact_search(
    target: float, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "ROUGH_SLOTS", 0)  # a CPU searches a small memory exactly
    monkeypatch.setattr(policy, "has_fast_bfloat16", lambda: False)
    memory = fill_rows(2053, [2053])
    queries = torch.randn(1, HEADS, 128, WIDTH)
    found = BucketedSearch(target, score_bytes)(queries, memory, 32)
    measured = recall(found, reference_search(queries, memory, 32))
    assert measured >= target - 0.02  # three standard errors of 8192 neighbours
    if target < 0.9 and score_bytes == 2**26:  # spans too short for buckets are searched exactly
        assert measured < 1.0


def test_buckets_follow_the_formula_of_the_paper() -> None:
    """(1 - 1/L)^(k - 1) >= r, and one bucket fewer would not do."""
    for top_k, target in ((32, 0.95), (32, 0.5), (8, 0.9), (2, 0.99)):
        buckets = num_buckets_for(top_k, target)
        assert (1 - 1 / buckets) ** (top_k - 1) >= target - 1e-12
        assert (1 - 1 / (buckets - 1)) ** (top_k - 1) < target


@pytest.mark.parametrize("width", [1, 7, 63, 64, 100, 129, 1000])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_largest_equals_topk(width: int, top_k: int) -> None:
    top_k = min(top_k, width)
    scores = torch.randn(2, 3, width)
    values, indices = largest(scores, top_k)
    expected = scores.topk(top_k)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_largest_survives_rows_with_few_finite_scores() -> None:
    scores = torch.full((1, 200), -torch.inf)
    scores[0, 190] = 1.0
    values, indices = largest(scores, 4)
    assert values[0, 0] == 1.0
    assert indices[0, 0] == 190
    assert (values[0, 1:] == -torch.inf).all()


def test_an_unknown_search_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*exact"):
        make_search("fast")


@pytest.mark.parametrize("name", SEARCHES)
def test_each_row_and_head_searches_its_own_pairs(name: str) -> None:
    """Every row and head holds one key far along its own axis, and all ask for all axes."""
    memory = Memory(2, HEADS, 4, WIDTH)
    keys = torch.zeros(2, HEADS, 4, WIDTH)
    for row in range(2):
        for head in range(HEADS):
            keys[row, head, 2 * row + head, 2 * row + head] = 1.0
    memory.write(keys, keys)
    queries = torch.eye(4, WIDTH).expand(2, HEADS, 4, WIDTH)
    search: Search = make_search(name)
    slots, _ = search(queries, memory, 1)
    for row in range(2):
        for head in range(HEADS):
            axis = 2 * row + head
            assert slots[row, head, axis, 0] == axis


@pytest.mark.parametrize("name", SEARCHES)
def test_what_one_token_asks_changes_nothing_for_the_others(name: str) -> None:
    """Else a token would learn of later ones, say by an index that settles on how they ask."""
    memory = Memory(1, 4, 4096, 16)
    keys = torch.nn.functional.normalize(torch.randn(1, 4, 3000, 16), dim=-1)
    memory.write(keys, keys)
    queries = torch.randn(1, 4, 64, 16)
    other = queries.clone()
    other[:, :, 32:] = 8 * keys[:, :, :32]
    found = []
    for asked in (queries, other):
        search = make_search(name, recall_target=0.9)
        search(torch.ones_like(queries), memory, 8)  # what earlier segments ask may count
        found.append(search(asked, memory, 8).slots[:, :, :32])
    assert torch.equal(*found)
