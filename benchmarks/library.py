"""What an index over very many pairs costs and finds: time, bytes, recall and RAM, of one head.

    python benchmarks/library.py --document book.txt --pairs 10000000
    python benchmarks/library.py --again

The second line searches what the first one has indexed, in a process that has read nothing else, so
its RAM is that of a search.

Keys and queries are those of a pretrained model that reads the document. As there are not so many
real keys, each one is repeated with noise of ``--noise`` times the keys' standard deviation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from measure import circumstances

from memorizing_transformers import memorize
from memorizing_transformers.data.tokens.tokenized_text import read_text, tokenize
from memorizing_transformers.data.tokens.tokenizers import load_tokenizer
from memorizing_transformers.generation.session import Session
from memorizing_transformers.memory import Memory, mapped
from memorizing_transformers.memory.search.indexed import IndexedSearch
from memorizing_transformers.memory.search.on_disk import OnDiskIndex, extend
from memorizing_transformers.pretrained.adapt import load_base

KEYS, ASKED = "keys.bin", "asked.pt"


def real(model_name: str, layer: int, document: Path, tokens: int) -> tuple[Any, Any]:
    """Keys (M, D) and queries (n, D) of the first key/value head of a layer."""
    base = load_base(model_name, "model")
    model = memorize(base, {"size": tokens, "search": "bucketed"}, [layer], xl_cache=1024).eval()
    ids = torch.from_numpy(tokenize(load_tokenizer(model_name), read_text(document)).ids)
    session = Session(model, 1, 1024)
    found: list[Any] = []

    def look(_: Session, __: Any, output: Any) -> None:
        found[:] = [output.retrievals[layer].queries]

    session.observer = look
    session.read(ids[None, :tokens])
    memory = session.bank.memories[layer]
    keys = memory.keys_at((0, 0, slice(int(memory.used[0]))))
    group = found[0].shape[1] // memory.keys.shape[1]
    return keys.numpy().copy(), found[0][0, :group].flatten(0, 1).numpy().copy()


def resident() -> dict[str, float]:
    """Gigabytes of RAM of this process: its own, and pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {name: int(sizes[name]) / 1e6 for name in ("RssAnon", "RssFile")}


def build(given: Any) -> dict[str, Any]:
    """Make keys, index them in parts, and find the true neighbours of some queries."""
    results: dict[str, Any] = {"add": []}
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    own, queries = real(given.model, given.layer, given.document, given.tokens)
    draw = np.random.default_rng(0)
    queries = queries[draw.choice(len(queries), given.queries, replace=False)]
    width, spread = own.shape[1], given.noise * own.std(0)
    store = np.memmap(given.folder / KEYS, "float32", "w+", shape=(given.pairs, width))
    for begin in range(0, given.pairs, 2**18):
        count = min(2**18, given.pairs - begin)
        noise = spread * draw.standard_normal((count, width), dtype="float32")
        store[begin : begin + count] = own[draw.integers(len(own), size=count)] + noise
    store.flush()

    def keys(begin: int, end: int) -> Any:
        return np.ascontiguousarray(store[begin:end])

    edges = np.linspace(0, given.pairs, given.additions + 1).astype(int).tolist()
    old = None
    for begin, end in pairwise(edges):
        new = given.folder / f"0.{end}.faiss"
        begun = time.perf_counter()
        extend(old, new, keys, begin, end)
        results["add"].append(time.perf_counter() - begun)
        print(f"added {end - begin:,} to {begin:,}: {results['add'][-1]:.1f} s", flush=True)
        for file in [] if old is None else given.folder.glob(f"{old.stem}.*"):
            file.unlink()
        old = new
    assert old is not None
    size = sum(file.stat().st_size for file in given.folder.glob(f"{old.stem}.*"))
    results["bytes a pair and head"] = size / given.pairs
    asked = torch.from_numpy(queries)
    begun = time.perf_counter()
    best = torch.full((given.queries, 0), 0.0)
    for part in torch.from_numpy(store).split(2**20):
        best = torch.cat([best, (asked @ part.T).topk(32).values], 1).topk(32).values
    exact = time.perf_counter() - begun
    results["exact, all queries at once, ms a query"] = 1e3 * exact / given.queries
    torch.save({"queries": asked, "least": best[:, -1], "keys": store.shape}, given.folder / ASKED)
    return results


def search(given: Any) -> dict[str, Any]:
    """Ask the index one query after the other."""
    asked = torch.load(given.folder / ASKED)
    count, width = asked["keys"]
    (file,) = given.folder.glob("*.faiss")
    results: dict[str, Any] = {"before": resident()}
    keys = torch.from_file(str(given.folder / KEYS), False, count * width).view(1, 1, count, width)
    stores = {name: torch.zeros(1, count, dtype=torch.int32) for name in ("token_ids", "steps")}
    memory = Memory(1, 1, 1, width)
    for probes in given.probes:
        for candidates in given.candidates:
            index = OnDiskIndex([file], probes)
            whole = {"keys": keys, "values": keys, **stores}
            found = mapped(memory, whole, count, IndexedSearch(index, candidates)).search
            times, hits = [], []
            for query, least in zip(asked["queries"], asked["least"], strict=True):
                begun = time.perf_counter()
                slots = found(query[None, None, None], memory, 32).slots[0, 0, 0]
                times.append(time.perf_counter() - begun)
                hits.append(float((keys[0, 0, slots] @ query >= least - 1e-4).float().mean()))
            results[f"probes {probes} of {index.heads[0].nlist}, candidates {32 * candidates}"] = {
                "recall@32": statistics.mean(hits),
                "ms a query": 1e3 * statistics.median(times),
                **resident(),
            }
    return results


def main() -> None:
    """Build or search."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="data/models/smollm2-135m")
    parser.add_argument("--layer", type=int, default=18)
    parser.add_argument("--document", type=Path, help="text file")
    parser.add_argument("--again", action="store_true", help="search an index that is there")
    parser.add_argument("--tokens", type=int, default=16384, help="of the document")
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--additions", type=int, default=10)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--probes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 16], help="a neighbour")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/library"))
    given = parser.parse_args()
    if not given.again and given.document is None:
        parser.error("give --document, or --again")
    faiss.omp_set_num_threads(torch.get_num_threads())
    results = {"circumstances": circumstances(), **(search(given) if given.again else build(given))}
    name = "searched.json" if given.again else "built.json"
    Path(given.folder, name).write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
