"""Groups of equally many keys that lie near each other: a tree that halves its nodes.

A node is cut across the direction in which its keys differ most, found by two steps of the power
method on a sample of them. A function of the keys alone, so a resumed run makes the same groups.

Shapes: M keys, D head width, L keys of a leaf, P leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 64
"""Keys of a node that its direction is taken from."""
POWER_STEPS = 2
TINY = 1e-30
"""Keeps the direction of equal keys finite."""


def _directions(nodes: Tensor) -> Tensor:
    """Of nodes (n, s, D) the directions (n, D, 1) in which their keys differ most, roughly."""
    sample = nodes[:, :: -(-nodes.shape[1] // SAMPLE)]
    sample = sample - sample.mean(1, keepdim=True)
    far = sample.square().sum(2).argmax(1)
    direction = sample[torch.arange(len(sample)), far][..., None]
    for _ in range(POWER_STEPS):
        direction = sample.mT @ (sample @ direction)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=TINY)
    return direction


def _sorted(keys: Tensor, order: Tensor) -> Tensor:
    """Nodes (n, s) of positions in ``keys``, each in the order along its direction."""
    nodes = keys.index_select(0, order.flatten()).view(*order.shape, -1)
    along = (nodes @ _directions(nodes)).squeeze(2)
    return order.gather(1, along.argsort(1))


def leaves(keys: Tensor, size: int) -> Tensor:
    """The keys (P, L) of each leaf as positions in ``keys``, in the order along its direction.

    Args:
        keys: (M, D) fp32.
        size: keys of a leaf L; M is a multiple of it.
    """
    # Nodes (n, s) by how many leaves they have: on each level there are two numbers at most.
    level = {len(keys) // size: torch.arange(len(keys))[None]}
    done = []
    while level:
        below: dict[int, list[Tensor]] = {}
        for count, nodes in level.items():
            nodes = _sorted(keys, nodes)
            if count == 1:
                done.append(nodes)
                continue
            left = count // 2
            below.setdefault(left, []).append(nodes[:, : left * size])
            below.setdefault(count - left, []).append(nodes[:, left * size :])
        level = {count: torch.cat(parts) for count, parts in below.items()}
    return torch.cat(done)
