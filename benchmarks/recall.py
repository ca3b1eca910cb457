"""Recall without a clock: of storage dtypes, of ways to deal slots to buckets, of searches.

    python benchmarks/recall.py --keys keys.pt --slots 8192 65536 --out runs/bench

Recall is the share of the true neighbours, by fp32 keys, that are found; next to the mean is the
worst of the eight heads. ``keys.pt`` is what ``real_keys.py`` wrote; random keys without.

With TRITON_INTERPRET=1 in the environment, and Triton installed, the fused kernel takes part, which
takes minutes.

A way of dealing says which bucket a slot falls into. Only the best slot of a bucket counts, so its
recall is the share of the true neighbours that share their bucket with no better one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from search import load
from torch import Tensor

from memorizing_transformers.memory import STORAGE_DTYPES, Memory, Neighbours, Search, make_search
from memorizing_transformers.memory.search import cells
from memorizing_transformers.memory.search.bucketed import BucketedSearch, num_buckets_for, rescored
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.memory.search.kernels.cpu_scan import odd_stride
from memorizing_transformers.memory.search.kernels.score_blocks import SCORE_BYTES
from memorizing_transformers.memory.search.policy import KERNELS, SPARE

Dealing = Callable[[Tensor, int, int], Tensor]
"""From slots, buckets L and slots M in all to the slots' buckets."""

DEALINGS: dict[str, Dealing] = {
    "strided: slot mod L": lambda slots, buckets, size: slots % buckets,
    "contiguous: M / L slots in a row": lambda slots, buckets, size: slots * buckets // size,
    "hashed: a random permutation, then mod L": lambda slots, buckets, size: (
        torch.randperm(size, generator=torch.Generator().manual_seed(0))[slots] % buckets
    ),
}


def figures(hits: Tensor) -> dict[str, float]:
    """Mean and worst head of hits (1, heads, Q, K)."""
    by_head = hits.float().mean((0, 2, 3))
    return {"recall": float(by_head.mean()), "worst head": float(by_head.min())}


def of_found(keys: Tensor, asked: Tensor, truth: Neighbours, found: Neighbours) -> dict[str, float]:
    """Recall of found slots; of two keys that score alike either will do."""
    scores = [
        torch.stack(
            [
                (k[s] * q[:, None]).sum(-1)
                for k, s, q in zip(keys, x.slots[0], asked[0], strict=True)
            ]
        )
        for x in (truth, found)
    ]
    least = scores[0].amin(-1, keepdim=True) - 1e-5 * asked[0].norm(dim=-1, keepdim=True)
    return figures(((scores[1] >= least) & found.valid[0])[None])


def of_dealing(slots: Tensor, deal: Dealing, buckets: int, size: int) -> dict[str, float]:
    """Recall where only the best slot of each bucket counts; true slots (1, heads, Q, K)."""
    dealt = deal(slots, buckets, size)
    better = (dealt[..., None, :] == dealt[..., :, None]).tril(-1).any(-1)
    return figures(~better)


def on_device(
    target: float, fused: bool, queries: Tensor, memory: Memory, top_k: int
) -> Neighbours:
    """The bucketed search as it runs on a GPU, by the Triton kernel or without it."""
    buckets = odd_stride(max(top_k, num_buckets_for(top_k, target)))
    spare = top_k // SPARE if fused else 0
    kernel = KERNELS["triton" if fused else "torch"]
    found = kernel.run(queries, memory, top_k + spare, buckets, SCORE_BYTES)
    return rescored(queries, memory, found, top_k) if kernel.rough else found


def measure(keys: Tensor, queries: Tensor, top_k: int, targets: list[float]) -> dict[str, Any]:
    """All three tables at one memory size."""
    heads, slots, width = keys.shape
    # An index learns from earlier queries how hard it must look.
    before, asked = queries[None].chunk(2, dim=2)

    def find(search: Search, dtype: torch.dtype) -> Neighbours:
        memory = Memory(1, heads, slots, width, dtype)
        for part in (keys[None, :, :top_k], keys[None, :, top_k:]):
            memory.write(part, part)
            found = search(before if part.shape[2] == top_k else asked, memory, top_k)
        return found

    truth = find(ExactSearch(), torch.float32)
    storage, dealings, searches = [], [], []
    for name, dtype in STORAGE_DTYPES.items():
        found = find(ExactSearch(), dtype)
        storage.append({"slots": slots, "storage": name, **of_found(keys, asked, truth, found)})
        for target in targets:
            rivals = {
                "bucketed on a CPU": BucketedSearch(target),
                "bucketed in plain torch": partial(on_device, target, False),
                "cells": make_search("cells", target),
                "faiss-ivf": make_search("faiss-ivf", target),
            }
            if os.environ.get("TRITON_INTERPRET") == "1":
                rivals["bucketed, fused kernel"] = partial(on_device, target, True)
            for search, run in rivals.items():
                share = of_found(keys, asked, truth, find(run, dtype))
                searches.append(
                    {"slots": slots, "storage": name, "target": target, "search": search, **share}
                )
    for target in targets:
        for buckets in (num_buckets_for(top_k, target), slots // 32, slots // 32 + 1):
            for name, deal in DEALINGS.items():
                share = of_dealing(truth.slots, deal, buckets, slots)
                dealings.append(
                    {"slots": slots, "target": target, "buckets": buckets, "dealing": name, **share}
                )
    return {"storage": storage, "dealing": dealings, "search": searches}


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="what real_keys.py wrote; random without")
    parser.add_argument("--slots", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--top_k", type=int, default=32)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.95])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    # Also where cells do not pay.
    cells.LEAST_SLOTS = cells.LEAST_QUERIES = cells.LEAST_SCORES = 1
    facts: dict[str, Any] = {"keys": str(given.keys or "random"), "top_k": given.top_k}
    for slots in given.slots:
        made = measure(*load(given.keys, slots), given.top_k, given.targets)
        for name, rows in made.items():
            facts.setdefault(name, []).extend(rows)
    tables = [table(facts[name]) for name in ("storage", "dealing", "search")]
    save(given.out, "recall", facts, "\n\n".join(tables))


if __name__ == "__main__":
    main()
