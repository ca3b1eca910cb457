"""How a ring takes over what another one held: in blocks of one row, never all of it twice.

Shapes: B rows, G key/value heads, M slots, D head width, n slots of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .storage import SCALES, converted

if TYPE_CHECKING:
    from .ring import Memory

BLOCK_BYTES = 16 * 2**20
"""Of the keys or the values of a block, in fp32. Converting them needs so much room, and so may
copying them to a device."""


def check_loadable(given: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    """Refuse, before anything is written, what does not fit a memory or a cache.

    A copy would broadcast one head to all, or fail where counts are set and pairs are not.

    Args:
        given: what ``tensors`` of a store gave; only the number of its slots may be another.
        own: the same of the store that is to take it over.
        name: of the store, for the message.

    Raises:
        ValueError: naming what does not fit, with both shapes.
    """
    wanted = {key: tensor.shape for key, tensor in own.items() if key not in SCALES.values()}
    for key, scales in SCALES.items():
        if key in given and given[key].dtype == torch.int8:
            wanted[scales] = wanted[key][:3]
    slots: int | None = None
    for key, shape in wanted.items():
        if key not in given:
            if key == "oldest":  # checkpoints of earlier versions know of no dropped pairs
                continue
            raise ValueError(f"{name}: no {key} among {[*given]}; give all that tensors() names")
        fits: list[int | str] = [*shape]
        found = [*given[key].shape]
        if len(shape) > 1:
            at = min(2, len(shape) - 1)
            # The first pairs that a cache keeps have a number of their own.
            own_number = key.startswith("first_")
            fits[at] = "any" if own_number or slots is None else slots
            if len(found) == len(shape):
                slots = slots if own_number or slots is not None else found[at]
                fits[at] = found[at] if fits[at] == "any" else fits[at]
        if found != fits:
            must = ", ".join(str(size) for size in fits)
            raise ValueError(f"{name}: {key} of shape {(*found,)} must be of shape ({must})")


class Block(NamedTuple):
    """Neighbouring slots of a row."""

    row: int
    source: slice
    """(n,) where they are in the old ring."""
    target: slice
    """(n,) where they go in the new one."""


def blocks(
    written: Tensor, old: tuple[Tensor, int], new: tuple[Tensor, int], most: int
) -> Iterator[Block]:
    """The newest pairs of each row, oldest first; all slots as they are if the sizes agree.

    Args:
        written: (B,) pairs written to each row.
        old: origins (B,) and slots of the old ring.
        new: the same of the new one.
        most: slots n of a block, at most.
    """
    (old_origins, old_size), (new_origins, new_size) = old, new
    facts = (written.tolist(), old_origins.tolist(), new_origins.tolist())
    for row, (end, old_origin, new_origin) in enumerate(zip(*facts, strict=True)):
        number = max(new_origin, end - min(old_size, new_size))
        if old_size == new_size:
            number, end, old_origin, new_origin = 0, old_size, 0, 0
        while number < end:
            source, target = (number - old_origin) % old_size, (number - new_origin) % new_size
            count = min(end - number, old_size - source, new_size - target, most)
            yield Block(row, slice(source, source + count), slice(target, target + count))
            number += count


def copy_pairs(given: Mapping[str, Tensor], memory: Memory, origins: Tensor) -> None:
    """Copy the pairs, and what is known of each, into a memory's own tensors.

    Nothing is made on the memory's device but what one block needs there.

    Args:
        given: what ``Memory.tensors`` gave, on any device.
        memory: its ``origin`` is set; its slots may be of another number and storage dtype.
        origins: (B,) those of the old ring.
    """
    own = {name: tensor for name, tensor in memory.tensors().items() if tensor.ndim > 1}
    _, groups, old_size, width = given["keys"].shape
    most = max(1, BLOCK_BYTES // (4 * groups * width))
    old, new = (origins, old_size), (memory.origin, memory.size)
    for row, source, target in blocks(given["written"], old, new, most):
        block = {
            name: _slots(tensor, row, source) for name, tensor in given.items() if tensor.ndim > 1
        }
        block = converted(block, memory.keys.dtype)
        for name, tensor in own.items():
            _slots(tensor, row, target).copy_(block[name])


def _slots(tensor: Tensor, row: int, slots: slice) -> Tensor:
    """What a tensor (B, M) or (B, G, M, ...) holds of a row's slots; a view."""
    return tensor[row, slots] if tensor.ndim == 2 else tensor[row, :, slots]
