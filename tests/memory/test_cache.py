"""The XL cache against a list that appends and keeps the last W."""

from __future__ import annotations

import pytest
import torch
from peak import Peak

from memorizing_transformers.memory import XLCache
from memorizing_transformers.memory.cache import _copied, _gathered

ROWS, HEADS, WIDTH = 3, 2, 3


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("size", "length"), [(4, 4), (10, 4), (3, 8), (7, 5), (1, 3)])
def test_holds_the_last_tokens_of_every_row_newest_at_the_right(
    size: int, length: int, padded: bool
) -> None:
    cache = XLCache(ROWS, HEADS, size, WIDTH)
    slow: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(ROWS)]
    for _ in range(10):
        forget = torch.rand(ROWS) < 0.2
        cache.reset(forget)
        keys, values = torch.randn(2, ROWS, HEADS, length, WIDTH)
        real = torch.randint(0, length + 1, (ROWS,)) if padded else torch.full((ROWS,), length)
        cache.write(keys, values, torch.arange(length) < real[:, None] if padded else None)
        for row in range(ROWS):
            old = [] if forget[row] else slow[row]
            new = [(keys[row, :, token], values[row, :, token]) for token in range(real[row])]
            slow[row] = (old + new)[-size:]
            held = len(slow[row])
            assert cache.length[row] == held
            assert cache.valid()[row].tolist() == [False] * (size - held) + [True] * held
            for place, (key, value) in zip(range(size - held, size), slow[row], strict=True):
                assert torch.equal(cache.keys[row, :, place], key)
                assert torch.equal(cache.values[row, :, place], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "length"), [(4, 4), (10, 4), (3, 8), (1, 3)])
def test_what_waits_for_nothing_makes_the_same(size: int, length: int, dtype: torch.dtype) -> None:
    """As on a GPU, where the host does not know how many tokens are real."""
    old = torch.randn(5, HEADS, size, WIDTH)
    new = torch.randn(5, HEADS, length, WIDTH).to(dtype)
    counts = torch.tensor([length, length, 0, 1, length])
    assert torch.equal(_gathered(old, new, counts), _copied(old, new, counts.tolist()))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_write_takes_room_for_the_new_cache_alone(padded: bool) -> None:
    cache = XLCache(ROWS, HEADS, 400, WIDTH)
    pairs = torch.randn(2, ROWS, HEADS, 300, WIDTH)
    mask = torch.arange(300) < torch.tensor([[300], [100], [300]]) if padded else None
    with Peak() as peak:
        cache.write(*pairs, mask)
    assert peak.most < cache.nbytes() + 200


def test_reset_without_a_mask_empties_every_row() -> None:
    cache = XLCache(ROWS, HEADS, 4, WIDTH)
    cache.write(*torch.randn(2, ROWS, HEADS, 4, WIDTH))
    cache.reset()
    assert not cache.valid().any()


def test_what_is_cached_has_no_history() -> None:
    cache = XLCache(ROWS, HEADS, 4, WIDTH)
    pairs = torch.randn(2, ROWS, HEADS, 4, WIDTH, requires_grad=True)
    cache.write(*pairs)
    assert not cache.keys.requires_grad
    assert not cache.values.requires_grad


def test_a_copy_keeps_what_it_held() -> None:
    """A recomputing layer reads such a copy after the original was written and reset."""
    from copy import copy

    cache = XLCache(ROWS, HEADS, 4, WIDTH)
    cache.write(*torch.randn(2, ROWS, HEADS, 3, WIDTH))
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    changes = (
        lambda c: c.write(*torch.randn(2, ROWS, HEADS, 3, WIDTH)),
        lambda c: c.write(*torch.randn(2, ROWS, HEADS, 3, WIDTH), torch.ones(ROWS, 3).tril() > 0),
        lambda c: c.reset(torch.tensor([True, False, True])),
        lambda c: c.reset(),
        lambda c: c.load(XLCache(ROWS, HEADS, 4, WIDTH).tensors()),
    )
    for change in changes:
        changed, held = copy(cache), copy(cache)
        change(changed)
        for name, tensor in held.tensors().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("old", [2, 4, 9])
def test_loaded_into_another_size_it_holds_the_newest_tokens(old: int) -> None:
    source, cache = XLCache(ROWS, HEADS, old, WIDTH), XLCache(ROWS, HEADS, 4, WIDTH)
    cache.write(*torch.randn(2, ROWS, HEADS, 4, WIDTH))
    keys, values = torch.randn(2, ROWS, HEADS, 6, WIDTH)
    mask = torch.arange(6) < torch.tensor([[1], [3], [6]])
    source.write(keys, values, mask)
    cache.load(source.tensors())
    for row, written in enumerate((1, 3, 6)):
        held = min(written, old, 4)
        assert cache.length[row] == held
        newest = slice(written - held, written)
        assert torch.equal(cache.keys[row, :, 4 - held :], keys[row, :, newest])
        assert torch.equal(cache.values[row, :, 4 - held :], values[row, :, newest])


def test_bytes_are_counted() -> None:
    assert XLCache(2, HEADS, 4, WIDTH).nbytes() == 2 * 2 * HEADS * 4 * WIDTH * 4 + 2 * 8
