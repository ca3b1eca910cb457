"""Time and recall of every search against faiss and the bare matrix product.

    python benchmarks/search.py --keys keys.pt --slots 8192 65536 --out runs/bench

Without ``--keys`` (see ``real_keys.py``) keys are random. The answer of each search is checked
before its time is taken: exact ones must find every true neighbour.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import matplotlib
import torch
import torch.nn.functional as F
from measure import circumstances, interleaved, save, summary, table
from torch import Tensor

from memorizing_transformers.memory import SEARCHES, Memory, Search, make_search
from memorizing_transformers.memory.search.recall import measured_recall

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXACT = ("exact", "faiss.knn")


def load(path: Path | None, slots: int) -> tuple[Tensor, Tensor]:
    """Keys (8, slots, 64) and queries (8, 512, 64): the newest of the file, or random."""
    if path is not None:
        saved = torch.load(path, weights_only=True)
        if saved["keys"].shape[1] < slots:
            raise SystemExit(f"--keys: {path} holds {saved['keys'].shape[1]} slots, not {slots}")
        return saved["keys"][:, -slots:].float().contiguous(), saved["queries"].float()
    torch.manual_seed(0)
    keys, queries = torch.randn(8, slots, 64), torch.randn(8, 512, 64)
    return F.normalize(keys, dim=-1), 8 * F.normalize(queries, dim=-1)


def knn(keys: Tensor, queries: Tensor, top_k: int) -> Callable[[], list[Any]]:
    """Faiss's flat search of every head."""
    pairs = [(q.numpy(), k.numpy()) for q, k in zip(queries, keys, strict=True)]
    metric = faiss.METRIC_INNER_PRODUCT
    return lambda: [faiss.knn(q, k, top_k, metric=metric) for q, k in pairs]


def run(
    keys: Tensor,
    queries: Tensor,
    top_k: int,
    names: list[str],
    repeats: int,
    dtype: str,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One row of figures for each search at one memory size."""
    heads, slots, width = keys.shape
    memory = Memory(1, heads, slots, width, getattr(torch, dtype))
    memory.write(keys[None], keys[None])
    asked = queries[None]
    transposed, product = keys.mT, torch.empty(heads, queries.shape[1], slots)
    rivals: dict[str, Callable[[], object]] = {
        "matrix product": lambda: torch.bmm(queries, transposed, out=product),
        "faiss.knn": knn(keys, queries, top_k),
    }
    searches: dict[str, Search] = {name: make_search(name) for name in names}
    recall = {"faiss.knn": 1.0, "matrix product": float("nan")}
    for name, search in searches.items():
        rivals[name] = lambda search=search: search(asked, memory, top_k)
        search(asked, memory, top_k)
        recall[name] = measured_recall(search, asked, memory, top_k, sample=512)
        if name in EXACT and recall[name] < 1:
            raise SystemExit(f"{name} found {recall[name]:.4f} of the true neighbours, not all")
    times = {name: summary(x) for name, x in interleaved(rivals, repeats, clock=clock).items()}
    flat = times["faiss.knn"]["median"]
    bare = times["matrix product"]["median"]
    return [
        {
            "slots": slots,
            "search": name,
            "ms": 1e3 * time["median"],
            "least ms": 1e3 * time["least"],
            "spread": time["spread"],
            "recall": recall[name],
            "times faiss.knn": flat / time["median"],
            "of matrix product": time["median"] / bare,
        }
        for name, time in times.items()
    ]


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Time against slots and recall against time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in dict.fromkeys(row["search"] for row in rows):
        own = [row for row in rows if row["search"] == name]
        left.plot([r["slots"] for r in own], [r["ms"] for r in own], marker="o", label=name)
        right.plot([r["ms"] for r in own], [r["recall"] for r in own], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="slots", ylabel="ms a search")
    right.set(xscale="log", xlabel="ms a search", ylabel="recall")
    left.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    """Measure and write JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="what real_keys.py wrote; random without")
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 8192, 65536])
    parser.add_argument("--top_k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    searches = ["exact", "bucketed", "faiss-ivf"]
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=searches)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--busy", action="store_true", help="one thread, processor time: for a machine in use"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    clock = time.process_time if given.busy else time.perf_counter
    if given.busy:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    facts = {
        "circumstances": circumstances(),
        "clock": clock.__name__,
        "keys": str(given.keys or "random"),
        "rows": [],
    }
    for slots in given.slots:
        keys, queries = load(given.keys, slots)
        facts["rows"] += run(
            keys, queries, given.top_k, given.searches, given.repeats, given.dtype, clock
        )
    save(given.out, "search", facts, f"{facts['circumstances']}\n\n{table(facts['rows'])}")
    plot(facts["rows"], given.out / "search.png")


if __name__ == "__main__":
    main()
