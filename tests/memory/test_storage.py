"""What int8 keeps of a vector, and what happens between storage dtypes."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers.memory import STORAGE_DTYPES, Memory
from memorizing_transformers.memory.storage import converted, quantize, restore, slot_bytes

HEADS, WIDTH = 2, 8


def test_every_number_is_within_half_a_step() -> None:
    x = torch.randn(50, WIDTH) * torch.logspace(-20, 20, 50)[:, None]
    integers, scales = quantize(x)
    assert integers.dtype == torch.int8
    torch.testing.assert_close(scales * 127, x.abs().amax(-1))
    error = (restore(integers, scales) - x).abs() / scales[:, None]
    assert 0.4 < error.max() <= 0.5 + 1e-4
    assert (integers.abs().amax(-1) == 127).all()


def test_zeros_stay_zeros_and_rubbish_is_not_hidden() -> None:
    x = torch.ones(4, WIDTH)
    x[0], x[1], x[2, 3], x[3, 4] = 0.0, 1e-44, torch.nan, torch.inf
    restored = restore(*quantize(x))
    assert not restored[:2].any()
    assert not restored[2].isfinite().any()
    assert not restored[3].isfinite().all()


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_bytes_of_a_slot(name: str) -> None:
    dtype = STORAGE_DTYPES[name]
    sizes = [Memory(3, HEADS, size, WIDTH, dtype).nbytes() for size in (10, 11)]
    assert sizes[1] - sizes[0] == 3 * slot_bytes(dtype, HEADS, WIDTH)


def filled(dtype: torch.dtype, size: int = 7) -> Memory:
    memory = Memory(2, HEADS, size, WIDTH, dtype)
    memory.write(
        *torch.randn(2, 2, HEADS, 5, WIDTH), torch.tensor([[True] * 5, [True] * 3 + 2 * [False]])
    )
    return memory


@pytest.mark.parametrize("size", [7, 3, 20])
@pytest.mark.parametrize("new", STORAGE_DTYPES)
@pytest.mark.parametrize("old", STORAGE_DTYPES)
def test_loaded_from_another_dtype_it_holds_the_same_pairs_rounded_once(
    old: str, new: str, size: int
) -> None:
    source = filled(STORAGE_DTYPES[old])
    memory = Memory(2, HEADS, size, WIDTH, STORAGE_DTYPES[new])
    memory.load(source.tensors())
    expected = Memory(2, HEADS, size, WIDTH, STORAGE_DTYPES[new])
    stored = (source.keys_at(...), restore(source.values, source.value_scales))
    for row, count in enumerate((5, 3)):
        kept = min(count, size)
        slots = torch.arange(count - kept, count)
        if old == new:
            for name in ("keys", "values", "key_scales", "value_scales"):
                ours, theirs = getattr(memory, name), getattr(source, name)
                if theirs is not None:
                    assert torch.equal(ours[row][:, slots % size], theirs[row][:, slots]), name
            continue
        pairs = (x[row : row + 1, :, :count] for x in stored)
        expected.reset()
        expected.write(*(x.expand(2, -1, -1, -1) for x in pairs))
        assert torch.equal(
            memory.keys_at(row)[:, slots % size], expected.keys_at(row)[:, slots % size]
        )
        assert torch.equal(
            memory.values[row][:, slots % size], expected.values[row][:, slots % size]
        )


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_what_is_stored_so_already_is_taken_over_to_the_bit(name: str) -> None:
    """To quantise again would move one scale in thirty by a unit in its last place."""
    dtype = STORAGE_DTYPES[name]
    source, memory = (Memory(2, HEADS, 400, WIDTH, dtype) for _ in range(2))
    source.write(*torch.randn(2, 2, HEADS, 400, WIDTH) * torch.logspace(-9, 9, 400)[:, None])
    tensors = source.tensors()
    same = converted(tensors, dtype)
    assert same.keys() == tensors.keys()
    assert all(same[key] is tensor for key, tensor in tensors.items())
    memory.load(tensors)
    for key, tensor in memory.tensors().items():
        assert torch.equal(tensor, tensors[key]), key


def test_scales_follow_the_default_dtype_nowhere() -> None:
    """Lightning's bf16-true sets the default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        memory = filled(torch.int8)
        assert memory.key_scales is not None
        assert memory.key_scales.dtype == torch.float32
        assert memory.keys_at(...).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
