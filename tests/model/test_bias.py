"""Position biases against tables and double loops."""

from __future__ import annotations

import warnings

import naive
import pytest
import torch

from memorizing_transformers.model.bias import LocalBias, MemoryBias, first_distances, t5_bucket

FIRSTS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
"""The first distance of each of 32 buckets up to 128, as the docstring has them."""


def test_buckets_equal_the_table() -> None:
    distances = torch.arange(2000)
    expected = [sum(first <= distance for first in FIRSTS) - 1 for distance in range(2000)]
    assert t5_bucket(distances, 32, 128).tolist() == expected


@pytest.mark.parametrize(("buckets", "longest"), [(4, 8), (8, 16), (32, 65536), (10, 100), (5, 7)])
def test_buckets_of_other_sizes_equal_the_naive_ones(buckets: int, longest: int) -> None:
    distances = torch.arange(0, 2 * longest, max(1, longest // 500))
    expected = [naive.bucket_of(distance, buckets, longest) for distance in distances.tolist()]
    found = t5_bucket(distances, buckets, longest)
    assert found.tolist() == [min(bucket, buckets - 1) for bucket in expected]
    assert found.max() == buckets - 1


@pytest.mark.parametrize("power", [1, 2, 5, 13])
@pytest.mark.parametrize("buckets", [4, 8, 16, 32, 64])
def test_every_bucket_begins_exactly_where_whole_numbers_say(buckets: int, power: int) -> None:
    """Distances that are exact powers stand on a boundary, where a logarithm may fall short."""
    exact = buckets // 2
    longest = max(buckets, exact * 2**power)

    def bucket_of(distance: int) -> int:
        """The most j with (distance / exact)^exact >= (longest / exact)^j, in whole numbers."""
        if distance < exact:
            return distance
        reached = [
            step
            for step in range(exact)
            if distance**exact >= longest**step * exact ** (exact - step)
        ]
        return exact + max(reached)

    near = range(2 * buckets)
    powers = [exact * 2**i + shift for i in range(power + 1) for shift in (-1, 0, 1)]
    firsts = [first + shift for first in first_distances(buckets, longest) for shift in (-1, 0)]
    distances = sorted({*near, *powers, *firsts})
    found = t5_bucket(torch.tensor(distances), buckets, longest).tolist()
    assert found == [bucket_of(distance) for distance in distances]
    assert len(set(found)) == len({bucket_of(distance) for distance in distances}) > exact


def test_the_bias_is_compiled_as_one_graph() -> None:
    bias = LocalBias(3, 32, 128)
    torch.nn.init.normal_(bias.table.weight)
    compiled = torch.compile(bias, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(5, 9), bias(5, 9))


def test_distances_before_the_first_get_bucket_zero() -> None:
    assert t5_bucket(torch.tensor([-3, -1]), 32, 128).tolist() == [0, 0]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (6, 11), (63, 200)])
def test_local_bias_equals_a_double_loop(queries: int, keys: int) -> None:
    """With a cache there are more keys than queries, and the last of both are the same token."""
    bias = LocalBias(3, 32, 128)
    torch.nn.init.normal_(bias.table.weight)
    found = bias(queries, keys)
    assert found.shape == (3, queries, keys)
    for query in range(queries):
        for key in range(keys - queries + query + 1):
            bucket = naive.bucket_of(keys - queries + query - key, 32, 128)
            assert torch.equal(found[:, query, key], bias.table.weight[min(bucket, 31)])


def test_local_bias_gradient_equals_a_double_loop() -> None:
    bias = LocalBias(2, 8, 16)
    upstream = torch.randn(2, 5, 9).tril(4)
    (found,) = torch.autograd.grad((bias(5, 9) * upstream).sum(), bias.table.weight)
    expected = torch.zeros(8, 2)
    for query in range(5):
        for key in range(query + 5):
            bucket = naive.bucket_of(4 + query - key, 8, 16)
            expected[min(bucket, 7)] += upstream[:, query, key]
    torch.testing.assert_close(found, expected)


def test_memory_bias_by_age_cuts_the_memory_in_equal_parts() -> None:
    bias = MemoryBias("learned-absolute", 2, 4, 64)
    torch.nn.init.normal_(bias.table.weight)
    age = torch.arange(10).expand(1, 2, 1, 10)
    found = bias(torch.zeros_like(age), age, 10)
    for head in range(2):
        expected = bias.table.weight[[0, 0, 0, 1, 1, 2, 2, 2, 3, 3], head]
        assert torch.equal(found[0, head, 0], expected)


def test_memory_bias_by_distance_uses_t5_buckets() -> None:
    bias = MemoryBias("t5", 2, 32, 128)
    torch.nn.init.normal_(bias.table.weight)
    distance = torch.tensor([1, 15, 16, 18, 19, 112, 113, 100_000]).expand(1, 2, 1, 8)
    found = bias(distance, torch.zeros_like(distance), 10)
    for head in range(2):
        expected = bias.table.weight[[1, 15, 16, 16, 17, 30, 31, 31], head]
        assert torch.equal(found[0, head, 0], expected)


@pytest.mark.parametrize("kind", ["t5", "learned-absolute"])
def test_a_new_bias_says_nothing(kind: str) -> None:
    distance = torch.randint(0, 50, (2, 3, 4, 5))
    assert not MemoryBias(kind, 3, 32, 128)(distance, distance, 50).any()
    assert not LocalBias(3, 32, 128)(4, 9).any()
