"""What a memory costs a generated token, or a segment that is read: several sizes beside none.

    python benchmarks/generate.py
    python benchmarks/generate.py --models data/models/smollm2-135m --sizes 65536
    python benchmarks/generate.py --part segments

The variants take turns in one run; reported are medians over tokens or segments. With segments
there is one more variant: a forward pass and a commit of the largest memory, as validation does
them, beside the session that reads a document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import circumstances

from memorizing_transformers import MemorizingTransformer, memorize
from memorizing_transformers.generation.session import Session
from memorizing_transformers.memory import Memory
from memorizing_transformers.pretrained.adapt import load_base
from memorizing_transformers.pretrained.induction import induction_layers

OWN: dict[str, dict[str, Any]] = {
    "quickstart": {"d_model": 128, "num_layers": 4, "num_heads": 4, "layers": [-1]},
    "d512": {"d_model": 512, "num_layers": 6, "num_heads": 8, "layers": [-2]},
    "quickstart-copies": {
        "d_model": 128,
        "num_layers": 4,
        "num_heads": 4,
        "layers": [-1],
        "copy": ["neighbours", "repeats"],
    },
}


def model_of(name: str, size: int, cache: int, search: str) -> Any:
    """A model with random weights, or a pretrained one; without a memory where size is 0."""
    if name not in OWN:
        base = load_base(name, "model")
        layers = induction_layers(base, show=False)
        return memorize(base, {"size": size, "search": search}, layers, xl_cache=cache).eval()
    settings = dict(OWN[name])
    memory = {"layers": settings.pop("layers"), "copy": settings.pop("copy", [])}
    memory = {**memory, "size": size, "search": search}
    return MemorizingTransformer(vocab_size=512, xl_cache=cache, memory=memory, **settings).eval()


@torch.no_grad()
def fill(memory: Memory, vocabulary: int, chunk: int = 8192) -> None:
    """Random pairs in every slot."""
    _, groups, size, width = memory.keys.shape
    for start in range(0, size, chunk):
        count = min(chunk, size - start) + getattr(memory, "skip_first", 0)
        keys = torch.nn.functional.normalize(torch.randn(1, groups, count, width), dim=-1)
        ids = torch.randint(vocabulary, (1, count))
        memory.write(keys, torch.randn(1, groups, count, width), token_ids=ids)


@torch.no_grad()
def plainly(model: Any, bank: Any, tokens: torch.Tensor) -> None:
    """Read a segment (1, N) without a session."""
    output = model(tokens, bank)
    bank.commit(output.pairs, token_ids=tokens)


def main() -> None:
    """Read tokens, take turns, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=["quickstart", "d512"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--part", choices=["tokens", "segments"], default="tokens")
    parser.add_argument("--tokens", type=int, default=200, help="that are generated")
    parser.add_argument("--turns", type=int, default=5, help="segments that each variant reads")
    parser.add_argument("--search", default="bucketed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/generate.json"))
    given = parser.parse_args()
    results: dict[str, Any] = {"circumstances": circumstances(), "models": {}}
    for name in given.models:
        sessions = {}
        for size in (0, *given.sizes):
            torch.manual_seed(0)
            model = model_of(name, size, given.segment, given.search)
            session = Session(model, 1, given.segment)
            vocabulary = model.config.vocab_size
            for memory in session.bank.memories.values():
                fill(memory, vocabulary)
            session.read(torch.randint(vocabulary, (1, given.segment)))
            session.read(torch.randint(vocabulary, (1, 4)))  # builds what a segment needs once
            sessions[size] = session
        turns = given.tokens if given.part == "tokens" else given.turns
        each = 1 if given.part == "tokens" else given.segment
        rivals: dict[str, Any] = {
            f"memory {size:,}": session.read for size, session in sessions.items()
        }
        if given.part == "segments":
            for session in sessions.values():
                session.close()
            rivals["forward and commit"] = partial(plainly, model, session.bank)
        seconds: dict[str, list[float]] = {rival: [] for rival in rivals}
        for _ in range(min(turns, given.segment - 8) if each == 1 else turns):
            tokens = torch.randint(vocabulary, (1, each))
            for rival, read in rivals.items():
                begun = time.process_time()
                read(tokens)
                seconds[rival].append(time.process_time() - begun)
        median = {rival: 1e3 * statistics.median(times) for rival, times in seconds.items()}
        results["models"][name] = median
        for rival, milliseconds in median.items():
            ratio = milliseconds / median["memory 0"]
            what = given.part.removesuffix("s")
            print(f"{name} {rival}: {milliseconds:.2f} ms a {what}, {ratio:.2f}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
