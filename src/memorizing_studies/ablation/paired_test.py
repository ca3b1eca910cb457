"""A paired test over documents: is one model's loss lower than another's?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import permutation_test

PERMUTATIONS = 9999
BLOCK = 2**22
"""The largest number of signs in memory at the same time."""
DECIMALS = 12
"""Decimals of the statistic, which is divided by its largest possible value."""


class Difference(NamedTuple):
    """The difference in loss between a variant and the base."""

    loss: float
    """Nats per token; if below 0, the variant is better."""
    p_value: float
    """Probability of a difference at least as large, in either direction, if neither is better."""
    documents: int
    spread: float | None
    """Sample standard deviation of the difference over seeds, or None with one seed."""


def sign_flip_test(losses: ArrayLike, base: ArrayLike, seed: int = 0) -> float:
    """Two-sided permutation test over documents.

    If neither model is better, the difference of each document has either sign with the same
    probability. The statistic is the sum of the differences, so long documents have more weight, as
    in the perplexity.

    Args:
        losses: (D,) the loss of each document, summed over its tokens, in nats.
        base: (D,) the same for the base.
        seed: the seed of the random sign patterns.

    Returns:
        the p-value. It is exact if there are at most ``PERMUTATIONS`` sign patterns, that is up to
        13 documents; else it is estimated from that many random patterns. It is at least 2 / 2**D.
    """
    difference = np.asarray(losses, float) - np.asarray(base, float)
    # A difference of 0 has no sign.
    difference = difference[difference != 0]
    if len(difference) < 2:
        return 1.0
    scale = np.abs(difference).sum()

    def statistic(signed: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        # Rounding errors must not decide whether a pattern equals the observed one.
        return np.round(signed.sum(axis) / scale, DECIMALS)

    found = permutation_test(
        (difference,),
        statistic,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        batch=max(1, BLOCK // len(difference)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def compare(
    variant: list[dict[str, list[float]]], base: list[dict[str, list[float]]]
) -> Difference | None:
    """The difference to the base. The loss of each document is first averaged over seeds.

    Args:
        variant: for each seed, by document: number of tokens, summed loss, checksum of the tokens.
        base: the same for the base, with the same seeds.

    Returns:
        None if the two did not read the same tokens.
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
        p_value=sign_flip_test(ours.mean(axis=0), theirs.mean(axis=0)),
        documents=len(names),
        spread=float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    )
