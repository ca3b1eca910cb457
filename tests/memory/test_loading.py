"""A ring that takes over what another one held, of whatever size and age."""

from __future__ import annotations

import pytest
import torch
from peak import Peak
from slow_ring import HEADS, WIDTH, SlowRow, assert_same, random_segment, write_to_both
from two_devices import AWAY, two_devices

from memorizing_transformers.memory import Memory, MemoryBank, XLCache, loading
from memorizing_transformers.memory.placed import PlacedMemory
from memorizing_transformers.pretrained.sink_cache import SinkCache


def test_a_checkpoint_from_before_pairs_could_be_dropped_is_read() -> None:
    source, slow = Memory(2, HEADS, 7, WIDTH), [SlowRow(7), SlowRow(7)]
    write_to_both(source, [random_segment(2, 5) for _ in range(2)], slow)
    old = {name: tensor for name, tensor in source.tensors().items() if name != "oldest"}
    memory = Memory(2, HEADS, 7, WIDTH)
    memory.write(*random_segment(2, 5)[:2])
    memory.drop(torch.tensor([3, 5]))
    memory.load(old)
    assert_same(memory, slow)


@pytest.mark.parametrize("new", [7, 4, 20])
def test_a_checkpoint_that_holds_positions_in_32_bits_is_read(new: int) -> None:
    """They are not needed, so those that ran over do no harm."""
    source, slow = Memory(2, HEADS, 7, WIDTH), [SlowRow(7), SlowRow(7)]
    write_to_both(source, [random_segment(2, 5, padded=True) for _ in range(3)], slow)
    old = {**source.tensors(), "positions": torch.full((2, 7), -(2**31), dtype=torch.int32)}
    memory = Memory(2, HEADS, new, WIDTH)
    memory.load(old)
    for row in slow:
        row.size, row.pairs = new, row.pairs[-new:]
    assert_same(memory, slow)


@pytest.mark.parametrize("before", [0, 1, 4], ids=lambda n: f"{n} segments")
@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 3), (7, 20), (7, 50), (12, 8)])
def test_loaded_into_another_size_it_holds_the_newest_pairs_and_no_others(
    old: int, new: int, before: int
) -> None:
    """What the smaller one had overwritten is not there, and is not taken for empty keys either."""
    source, slow = Memory(3, HEADS, old, WIDTH), [SlowRow(old) for _ in range(3)]
    write_to_both(source, [random_segment(3, 5, padded=True) for _ in range(before)], slow)
    memory = Memory(3, HEADS, new, WIDTH)
    memory.write(*random_segment(3, 9)[:2])
    memory.load({name: tensor.clone() for name, tensor in source.tensors().items()})
    for row in slow:
        row.size, row.pairs = new, row.pairs[-new:]
    assert_same(memory, slow)
    for _ in range(15):  # and goes on as if it had been there from the first
        write_to_both(memory, [random_segment(3, 4, padded=True)], slow)
        assert_same(memory, slow)
    for mask in (torch.tensor([True, False, True]), None):
        memory.reset(mask)
        slow = [SlowRow(new), slow[1] if mask is not None else SlowRow(new), SlowRow(new)]
        write_to_both(memory, [random_segment(3, 5)], slow)
        assert_same(memory, slow)


def test_loaded_twice_through_a_larger_one_it_is_still_right() -> None:
    slow, segments = [SlowRow(7)], [random_segment(1, 5) for _ in range(4)]
    memory = Memory(1, HEADS, 7, WIDTH)
    write_to_both(memory, segments, slow)
    for size in (11, 16, 9):
        larger = Memory(1, HEADS, size, WIDTH)
        larger.load(memory.tensors())
        memory = larger
        slow[0].size, slow[0].pairs = size, slow[0].pairs[-size:]
        assert_same(memory, slow)
        write_to_both(memory, [random_segment(1, 2)], slow)
        assert_same(memory, slow)


@pytest.mark.parametrize("size", [7, 40], ids=["wrapped", "not full"])
@pytest.mark.parametrize("again", [1, 3], ids=["one row reset", "all rows reset"])
def test_loaded_into_the_same_size_it_is_the_same_bit_for_bit(again: int, size: int) -> None:
    source = Memory(3, HEADS, size, WIDTH)
    source.write(*random_segment(3, 9)[:2])
    source.reset(torch.arange(3) < again)
    source.write(*random_segment(3, 3)[:2])
    memory = Memory(3, HEADS, size, WIDTH)
    memory.write(*random_segment(3, 2)[:2])
    memory.load(source.tensors())
    assert memory.max_fill == source.max_fill
    for name, tensor in source.tensors().items():
        assert torch.equal(memory.tensors()[name], tensor), name
        assert memory.tensors()[name].data_ptr() != tensor.data_ptr(), name


def test_loaded_into_another_dtype_it_is_rounded() -> None:
    source, memory = Memory(1, HEADS, 7, WIDTH), Memory(1, HEADS, 9, WIDTH, torch.bfloat16)
    source.write(*random_segment(1, 6)[:2])
    memory.load(source.tensors())
    assert torch.equal(memory.keys[:, :, :6], source.keys[:, :, :6].bfloat16())


@pytest.mark.parametrize("most", [1, 3], ids=lambda n: f"{n} slots a block")
@pytest.mark.parametrize("new", [7, 4, 20])
def test_in_blocks_of_any_size_it_holds_the_same(
    monkeypatch: pytest.MonkeyPatch, new: int, most: int
) -> None:
    source, slow = Memory(3, HEADS, 7, WIDTH), [SlowRow(7) for _ in range(3)]
    write_to_both(source, [random_segment(3, 5, padded=True) for _ in range(4)], slow)
    monkeypatch.setattr(loading, "BLOCK_BYTES", most * 4 * HEADS * WIDTH)
    memory = Memory(3, HEADS, new, WIDTH)
    memory.load(source.tensors())
    for row in slow:
        row.size, row.pairs = new, row.pairs[-new:]
    assert_same(memory, slow)


@pytest.mark.parametrize("away", [False, True], ids=["cpu", "another device"])
@pytest.mark.parametrize("old", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [1000, 700, 1500])
def test_loading_takes_room_for_one_block_beside_the_ring(
    monkeypatch: pytest.MonkeyPatch, size: int, old: torch.dtype, away: bool
) -> None:
    """Not for a second copy of everything, nor for an index of all slots."""
    source = Memory(4, 2, 1000, 16, old)
    source.write(*torch.randn(2, 4, 2, 1200, 16))
    tensors = {name: tensor.clone() for name, tensor in source.tensors().items()}
    monkeypatch.setattr(loading, "BLOCK_BYTES", 2**12)
    with Peak() as peak:
        if away:
            with two_devices():
                memory = Memory(4, 2, size, 16, device=AWAY)
                peak.most = held = peak.live
                memory.load(tensors)
        else:
            memory = Memory(4, 2, size, 16)
            peak.most = held = peak.live
            memory.load(tensors)
    # Keys and values of a block, while one of them is made; and numbers of each row.
    assert peak.most - held <= 3 * 2**12 + 1024
    assert held > 20 * 2**12


STORES = {
    "memory": Memory,
    "int8": lambda *shape: Memory(*shape, torch.int8),
    "placed": PlacedMemory,
    "cache": XLCache,
    "sinks": SinkCache,
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("in_bank", [False, True], ids=["alone", "in a bank"])
def test_what_does_not_fit_is_refused_before_anything_is_written(kind: str, in_bank: bool) -> None:
    """Any tensor of another shape but for its slots, or none; also in the last store."""

    def filled(rows: int = 2, heads: int = 4, size: int = 8, width: int = 6) -> Memory | XLCache:
        store: Memory | XLCache = STORES[kind](rows, heads, size, width)
        store.write(*torch.randn(2, rows, heads, 5, width))
        return store

    own = filled()
    first = Memory(2, 4, 8, 6)
    keeps = (
        {"memories": {0: first}} if isinstance(own, XLCache) else {"memories": {0: first, 1: own}}
    )
    if isinstance(own, XLCache):
        keeps["caches"] = {1: own}
    bank = MemoryBank(2, **keeps)
    prefix = "cache.1" if isinstance(own, XLCache) else "memory.1"
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    good = filled(size=11).tensors()
    other_first = Memory(2, 4, 8, 6)
    other_first.write(*torch.randn(2, 2, 4, 3, 6))

    def load(tensors: dict[str, torch.Tensor]) -> None:
        if not in_bank:
            own.load(tensors)
            return
        named = {f"memory.0.{name}": tensor for name, tensor in other_first.tensors().items()}
        bank.load({**named, **{f"{prefix}.{name}": tensor for name, tensor in tensors.items()}})

    def refused(tensors: dict[str, torch.Tensor], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            load(tensors)
        for name, tensor in bank.tensors().items():
            assert torch.equal(tensor, before[name]), name

    for wrong in ({"heads": 1}, {"heads": 8}, {"width": 1}, {"width": 7}):
        refused(filled(**wrong).tensors(), r"keys of shape .* must be of shape \(2, 4, 8, 6\)")
    refused({name: x[:1] for name, x in good.items()}, r"of shape|got 1 rows")
    for name, tensor in good.items():
        if name != "oldest":
            refused({key: x for key, x in good.items() if key != name}, f"no {name}")
        for dim in range(tensor.ndim):
            slots = tensor.ndim > 1 and dim == min(2, tensor.ndim - 1)
            # The first store tells the number of slots, and the first pairs have their own.
            if not slots or name in ("values", "steps"):
                refused({**good, name: tensor.narrow(dim, 0, 1)}, f"{name} of shape|got 1 rows")
    load(good)
