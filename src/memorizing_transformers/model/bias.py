"""Relative position biases.

Shapes: H heads, N queries, S keys, K neighbours, M slots.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn


def first_distances(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The first distance of every bucket but bucket 0, ascending.

    Computed in integers: a logarithm rounds differently from device to device, and a distance
    that is an exact power could fall on either side of its boundary.
    """
    exact = num_buckets // 2
    coarse = num_buckets - exact
    firsts = list(range(1, exact))
    for step in range(coarse):
        # The least d with (d / exact)^coarse >= (max_distance / exact)^step.
        least = max_distance**step * exact ** (coarse - step)
        low, high = exact, max_distance
        while low < high:
            middle = (low + high) // 2
            if middle**coarse < least:
                low = middle + 1
            else:
                high = middle
        firsts.append(low)
    return tuple(firsts)


@lru_cache(maxsize=64)
def _kept(num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    return torch.tensor(first_distances(num_buckets, max_distance), device=device)


def boundaries(num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """``first_distances`` on a device, where they are kept: a copy at every call would wait."""
    if torch.compiler.is_compiling():  # becomes a constant, and a cache a warning
        return torch.tensor(first_distances(num_buckets, max_distance), device=device)
    return _kept(num_buckets, max_distance, device)


def t5_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of a distance: half of them exact, the rest spaced by logarithm.

    Raffel et al., 2020 (T5), causal form: with 32 buckets and ``max_distance`` 128, distances 0 to
    15 have a bucket each, then buckets begin at 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67,
    77, 87, 99 and 113. A key behind its query gets bucket 0.

    Args:
        distance: integers, how many tokens the key lies before the query.
        num_buckets: buckets in all.
        max_distance: from here on the last bucket.
    """
    firsts = boundaries(num_buckets, max_distance, distance.device)
    return torch.bucketize(distance.contiguous(), firsts, right=True)


class LocalBias(nn.Module):
    """T5 bias on local attention, one table a layer.

    Args:
        num_heads: heads H.
        num_buckets: buckets of ``t5_bucket``.
        max_distance: its last boundary.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.table = nn.Embedding(num_buckets, num_heads)
        nn.init.zeros_(self.table.weight)

    @torch.no_grad()
    def look_back(self, bias: float) -> None:
        """Let head h begin with this bias at distance h, while distances have a bucket each."""
        exact = self.num_buckets // 2
        self.table.weight[:exact].fill_diagonal_(bias)

    def near(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """The bias as a constant and what differs from it at small distances.

        Returns:
            (H, F) for distances 0 to F - 1, what comes on top of the constant; and (H,) the
            constant, which is the bias from distance F on. F is at most ``num_keys``.
        """
        distance = torch.arange(min(self.max_distance, num_keys), device=self.table.weight.device)
        bucket = t5_bucket(distance, self.num_buckets, self.max_distance)
        far = self.table.weight[-1]
        return (self.table(bucket) - far).t(), far

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """(H, N, S) for the last ``num_queries`` of ``num_keys`` consecutive tokens.

        A key behind its query gets bucket 0; the causal mask hides it.
        """
        # Windows over one vector of distances: the backward pass sums S + N - 1 rows, not N * S.
        distance = torch.arange(num_keys - 1, -num_queries, -1, device=self.table.weight.device)
        bucket = t5_bucket(distance, self.num_buckets, self.max_distance)
        by_distance = self.table(bucket).t()
        return by_distance.unfold(1, num_keys, 1).flip(1)


class MemoryBias(nn.Module):
    """Bias on retrieved pairs, by distance in tokens (t5, log) or by age (learned-absolute).

    ``log``: ``-exp(slope) log(1 + distance / 64)``, one slope per head that starts at -5.

    Args:
        kind: t5 or learned-absolute.
        num_heads: heads H.
        num_buckets: buckets of the table.
        max_distance: with t5, the distance from which on the last bucket serves.
    """

    def __init__(self, kind: str, num_heads: int, num_buckets: int, max_distance: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        if kind == "log":
            self.slope = nn.Parameter(torch.full((num_heads,), -5.0))
            return
        self.table = nn.Embedding(num_buckets, num_heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, distance: Tensor, age: Tensor, size: int) -> Tensor:
        """Bias of each retrieved pair in fp32, on the device of ``distance``: the table is copied.

        Args:
            distance: (B, H, N, K) tokens between the query and the pair.
            age: (B, H, N, K) pairs written since, below ``size``.
            size: slots M of the memory; ages are cut in ``num_buckets`` equal parts of it.
        """
        if self.kind == "log":
            fall = self.slope.float().exp().to(distance.device)[:, None, None]
            return -fall * torch.log1p(distance / 64)
        if self.kind == "t5":
            bucket = t5_bucket(distance, self.num_buckets, self.max_distance)
        else:
            bucket = (age * self.num_buckets // size).clamp(0, self.num_buckets - 1)
        table = self.table.weight.to(bucket.device, torch.float32)
        head = torch.arange(table.shape[1], device=bucket.device)[:, None, None]
        return table[bucket, head]
