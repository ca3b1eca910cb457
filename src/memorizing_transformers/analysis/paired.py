"""A paired test over documents: is one model's loss lower than another's?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

PERMUTATIONS = 9999
BLOCK = 2**22
"""Signs drawn at once."""


class Difference(NamedTuple):
    """What changes from the base to a variant."""

    loss: float
    """Nats per token; below 0 the variant is better."""
    p_value: float
    """Chance of a difference at least as large, either way, if neither were better."""
    documents: int
    spread: float | None
    """Sample standard deviation of the loss over seeds, where there are several."""


def sign_flip_test(tokens: ArrayLike, losses: ArrayLike, base: ArrayLike, seed: int = 0) -> float:
    """Two-sided permutation test: if neither were better, each document's difference could as well
    have the other sign.

    The statistic is the difference per token over all documents, so long documents weigh more, as
    in the perplexity.

    Args:
        tokens: (D,) of each document.
        losses: (D,) summed over each document's tokens, in nats.
        base: (D,) likewise, of the base.
        seed: of the signs.

    Returns:
        the p-value, ``(1 + hits) / (1 + permutations)`` (Phipson and Smyth, 2010).
    """
    share = (np.asarray(losses, float) - np.asarray(base, float)) / np.sum(tokens)
    # Rounding must not decide whether a permutation equals what was observed.
    bound = abs(share.sum()) * (1 - 1e-9)
    generator, hits, left = np.random.default_rng(seed), 0, PERMUTATIONS
    while left:
        count = min(left, max(1, BLOCK // len(share)))
        signs = generator.integers(0, 2, (count, len(share)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ share) >= bound).sum())
        left -= count
    return (1 + hits) / (1 + PERMUTATIONS)


def compare(
    variant: list[dict[str, list[float]]], base: list[dict[str, list[float]]]
) -> Difference | None:
    """The difference to the base, documents being averaged over seeds first.

    Args:
        variant: for each seed, by document: tokens, summed loss, mark of the tokens.
        base: likewise, with the same seeds.

    Returns:
        None where they did not read the same tokens.
    """
    names = sorted(base[0])
    reads = [{name: (sums[0], sums[2]) for name, sums in one.items()} for one in [*variant, *base]]
    if not names or any(read != reads[0] for read in reads):
        return None
    tokens = np.array([base[0][name][0] for name in names])
    # Both (seeds, documents).
    ours, theirs = (
        np.array([[one[name][1] for name in names] for one in several])
        for several in (variant, base)
    )
    by_seed = (ours - theirs).sum(axis=1) / tokens.sum()
    return Difference(
        loss=float(by_seed.mean()),
        p_value=sign_flip_test(tokens, ours.mean(axis=0), theirs.mean(axis=0)),
        documents=len(names),
        spread=float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    )
