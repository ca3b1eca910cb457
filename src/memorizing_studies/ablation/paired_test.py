"""A paired test over documents: is one model's loss lower than another's?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import permutation_test

PERMUTATIONS = 9999
BLOCK = 2**22
"""Signs held at once."""
DECIMALS = 12
"""Of the statistic as a share of the largest that there can be."""


class Difference(NamedTuple):
    """What changes from the base to a variant."""

    loss: float
    """Nats per token; below 0 the variant is better."""
    p_value: float
    """Chance of a difference at least as large, either way, if neither were better."""
    documents: int
    spread: float | None
    """Sample standard deviation of the loss over seeds, where there are several."""


def sign_flip_test(losses: ArrayLike, base: ArrayLike, seed: int = 0) -> float:
    """Two-sided permutation test: if neither were better, each document's difference could as well
    have the other sign.

    The statistic is the sum of the differences, so long documents weigh more, as in the perplexity.

    Args:
        losses: (D,) summed over each document's tokens, in nats.
        base: (D,) likewise, of the base.
        seed: of the sign patterns that are drawn.

    Returns:
        the p-value: exact where there are at most ``PERMUTATIONS`` sign patterns, that is up to 13
        documents, otherwise from as many random ones. It is never below 2 / 2**D.
    """
    difference = np.asarray(losses, float) - np.asarray(base, float)
    # The sign of nothing changes nothing.
    difference = difference[difference != 0]
    if len(difference) < 2:
        return 1.0
    scale = np.abs(difference).sum()

    def statistic(signed: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        # Rounding errors must not decide whether a pattern equals what was observed.
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
        p_value=sign_flip_test(ours.mean(axis=0), theirs.mean(axis=0)),
        documents=len(names),
        spread=float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    )
