"""The bank: all that a model remembers, written and forgotten together."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from memorizing_transformers.memory import (
    Memory,
    MemoryBank,
    MemoryView,
    SegmentPairs,
    XLCache,
    attend,
)
from memorizing_transformers.memory.search.reference import reference_search

ROWS, HEADS, WIDTH = 2, 2, 3


def make_bank() -> MemoryBank:
    memories = {1: Memory(ROWS, HEADS, 7, WIDTH)}
    caches = {layer: XLCache(ROWS, HEADS, 4, WIDTH) for layer in range(2)}
    return MemoryBank(ROWS, memories, caches)


def segment(length: int = 5) -> SegmentPairs:
    """Other pairs for the memory than for the cache of a layer."""
    memory, *cache = (tuple(torch.randn(2, ROWS, HEADS, length, WIDTH)) for _ in range(3))
    return SegmentPairs({1: memory}, dict(enumerate(cache)))


def test_commit_writes_each_layer_its_own_pairs() -> None:
    bank, pairs = make_bank(), segment()
    bank.commit(pairs, token_ids=torch.arange(10).view(2, 5), step=3)
    assert torch.equal(bank.memories[1].keys[:, :, :5], pairs.memory[1][0])
    assert torch.equal(bank.memories[1].values[:, :, :5], pairs.memory[1][1])
    assert bank.memories[1].token_ids[:, :5].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert (bank.memories[1].steps[:, :5] == 3).all()
    for layer in range(2):
        assert torch.equal(bank.caches[layer].keys, pairs.cache[layer][0][:, :, -4:])
        assert torch.equal(bank.caches[layer].values, pairs.cache[layer][1][:, :, -4:])


def test_commit_leaves_padding_out_of_memory_and_cache() -> None:
    bank = make_bank()
    bank.commit(segment(), mask=torch.arange(5) < torch.tensor([[2], [0]]))
    assert bank.memories[1].fill.tolist() == [2, 0]
    assert [cache.length.tolist() for cache in bank.caches.values()] == [[2, 0], [2, 0]]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mask": torch.ones(ROWS, 4, dtype=torch.bool)}, r"mask of shape \(2, 4\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask of shape"),
        ({"mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]).bool()}, "mask: padding"),
        ({"mask": torch.tensor([[1] * 5, [1, 0, 1, 1, 0]])}, "mask: padding"),
        ({"token_ids": torch.zeros(ROWS, 4, dtype=torch.int64)}, "token_ids of shape"),
    ],
    ids=["short", "flat", "left", "hole", "tokens"],
)
def test_a_commit_of_other_tokens_than_the_segments_writes_nothing(
    given: dict[str, torch.Tensor], named: str
) -> None:
    bank = make_bank()
    with pytest.raises(ValueError, match=named):
        bank.commit(segment(), **given)
    assert not bank.memories[1].fill.any()
    assert not any(cache.length.any() for cache in bank.caches.values())


def test_a_mask_of_transformers_is_one_of_numbers() -> None:
    pairs, banks = segment(), (make_bank(), make_bank())
    numbers = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    banks[0].commit(pairs, mask=numbers)
    banks[1].commit(pairs, mask=numbers.bool())
    one, other = (bank.memories[1].tensors() for bank in banks)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_reset_forgets_the_flagged_rows_everywhere() -> None:
    bank = make_bank()
    bank.commit(segment())
    bank.reset(torch.tensor([True, False]))
    assert bank.memories[1].fill.tolist() == [0, 5]
    assert all(cache.length.tolist() == [0, 4] for cache in bank.caches.values())


def test_commit_refuses_another_number_of_rows() -> None:
    for kind in ("memory", "cache"):
        pairs = segment()
        fewer = {layer: (k[:1], v[:1]) for layer, (k, v) in getattr(pairs, kind).items()}
        with pytest.raises(ValueError, match="a bank of 2 rows got 1 rows"):
            make_bank().commit(pairs._replace(**{kind: fewer}))


def test_tensors_name_everything_that_is_held() -> None:
    bank = make_bank()
    named = bank.tensors()
    assert {name.rsplit(".", 1)[0] for name in named} == {"memory.1", "cache.0", "cache.1"}
    assert all(tensor.shape[0] == ROWS for tensor in named.values())
    assert bank.nbytes() == sum(t.numel() * t.element_size() for t in named.values())


def test_a_loaded_bank_is_the_one_that_was_saved() -> None:
    source, bank = make_bank(), make_bank()
    source.commit(segment(), mask=torch.arange(5) < torch.tensor([[2], [5]]))
    bank.commit(segment())
    bank.load(source.tensors())
    for name, tensor in source.tensors().items():
        assert torch.equal(bank.tensors()[name], tensor), name
    pairs = segment()
    source.commit(pairs)
    bank.commit(pairs)
    for name, tensor in source.tensors().items():
        assert torch.equal(bank.tensors()[name], tensor), name


def test_loading_leaves_alone_what_the_other_bank_lacked() -> None:
    bank = make_bank()
    bank.commit(segment())
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    bank.load(MemoryBank(ROWS, {0: Memory(ROWS, HEADS, 7, WIDTH)}).tensors())
    for name, tensor in bank.tensors().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("rows", [1, 3])
def test_loading_refuses_another_number_of_rows(rows: int) -> None:
    """One row would broadcast to all."""
    stranger = MemoryBank(rows, {1: Memory(rows, HEADS, 7, WIDTH)})
    with pytest.raises(ValueError, match=f"a bank of 2 rows got {rows} rows"):
        make_bank().load(stranger.tensors())


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_goes_on_by_itself(way: str) -> None:
    """Equal, independent, and fit to be read with a gradient, though the first one is being so."""
    bank = make_bank()
    bank.commit(segment())
    queries = torch.randn(ROWS, HEADS, 3, WIDTH, requires_grad=True)

    def read(memory: Memory) -> torch.Tensor:
        return attend(queries, memory, reference_search(queries.detach(), memory, 2)).output

    pending = read(bank.memories[1])
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(bank, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(bank) if way == "deepcopy" else pickle.loads(pickle.dumps(bank))
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, before[name]), name
    again = read(other.memories[1])
    other.commit(segment())
    other.reset(torch.tensor([True, False]))
    for name, tensor in bank.tensors().items():
        assert torch.equal(tensor, before[name]), name
    bank.commit(segment())
    gradients = [torch.autograd.grad(x.square().sum(), queries)[0] for x in (pending, again)]
    assert torch.equal(*gradients)


def test_a_view_in_a_bank_is_read_and_never_written() -> None:
    owner = make_bank().memories[1]
    owner.write(*torch.randn(2, ROWS, HEADS, 4, WIDTH))
    before = {name: tensor.clone() for name, tensor in owner.tensors().items()}
    bank = make_bank()
    bank.memories[1] = MemoryView(owner, [1, 0])
    bank.commit(segment())
    bank.reset()
    assert {name.split(".")[0] for name in bank.tensors()} == {"cache"}
    bank.load(bank.tensors())
    assert all(torch.equal(before[name], tensor) for name, tensor in owner.tensors().items())
    assert bank.memories[1].fill.tolist() == [4, 4]
