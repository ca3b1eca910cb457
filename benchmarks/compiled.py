"""Time of a training step with ``model.compile`` and without, and of the compiling itself.

    python benchmarks/compiled.py

Forward, loss, commit, backward and optimiser step of a byte model whose memory is full, on random
tokens. Rivals: nothing compiled; the dense parts of each layer, as where no single graph is
possible; a segment's forward pass as one graph. Parity comes before any time: loss and gradients of
one segment, on memories that hold the same. Rivals take turns, round by round. Processor time, one
thread: waiting for other work does not count. ``first call`` is forward and backward, with the
compiling, from empty caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import circumstances, rounds, save, summary, table
from torch import Tensor

from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer, compiled

SIZES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "quickstart": (8, 128, {"num_layers": 3, "d_model": 128, "num_heads": 4}, {"size": 2048}),
    "best": (
        8,
        128,
        {"num_layers": 3, "d_model": 128, "num_heads": 4, "xl_cache": 128},
        {"size": 2048, "copy": ["neighbours", "repeats"]},
    ),
    "d512": (
        2,
        512,
        {"num_layers": 6, "d_model": 512, "num_heads": 8, "num_kv_heads": 1, "xl_cache": 512},
        {"size": 8192},
    ),
}
"""By name rows, segment, and what differs from the defaults in the model and in its memory."""
RIVALS = ("plain", "parts", "one graph")


class Rival:
    """A model and its full bank."""

    def __init__(self, size: str, kind: str, vocabulary: int) -> None:
        rows, segment, model, memory = SIZES[size]
        self.kind, self.shape, self.vocabulary = kind, (rows, segment), vocabulary
        config = ModelConfig(
            vocab_size=vocabulary,
            compile=kind != "plain",
            memory=MemoryConfig(layers=[-1], **memory),
            **model,
        )
        torch.manual_seed(0)
        self.net = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-6)
        self.tokens = torch.Generator().manual_seed(0)
        self.bank = self.net.new_memory(rows)
        for _ in range(0, memory["size"] + model.get("xl_cache", 0), segment):
            ids = self.segment()
            shape = (rows, config.kv_heads, segment, config.head_width)
            pairs = (torch.randn(shape, generator=self.tokens) for _ in range(2))
            keys, values = (x / x.norm(dim=-1, keepdim=True) for x in pairs)
            for store in (*self.bank.memories.values(), *self.bank.caches.values()):
                store.write(keys, values, **self.ids_of(store, ids))

    @staticmethod
    def ids_of(store: Any, ids: Tensor) -> dict[str, Tensor]:
        """The tokens, for the stores that keep them."""
        return {"token_ids": ids} if hasattr(store, "token_ids") else {}

    def segment(self) -> Tensor:
        """Random tokens (rows, N + 1)."""
        rows, count = self.shape
        return torch.randint(0, self.vocabulary, (rows, count + 1), generator=self.tokens)[:, :-1]

    def read(self, ids: Tensor) -> Tensor:
        """The loss of a segment, which is committed."""
        whole = Transformer._fits_one_graph
        allowed = whole if self.kind == "one graph" else lambda *_: False
        with mock.patch.object(Transformer, "_fits_one_graph", allowed):
            output = self.net.score(ids, self.bank, ids.roll(-1, 1))
        self.bank.commit(output.pairs, token_ids=ids)
        assert output.nll is not None
        return output.nll.mean()

    def step(self) -> float:
        """One training step; its seconds."""
        ids = self.segment()
        begun = time.process_time()
        loss = self.read(ids)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - begun

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Loss and gradients of one segment."""
        loss = self.read(self.segment())
        made = torch.autograd.grad(loss, list(self.net.parameters()), allow_unused=True)
        return loss.detach(), torch.cat([x.flatten() for x in made if x is not None])


def parity(rivals: dict[str, Rival]) -> tuple[dict[str, float], dict[str, float]]:
    """How far the gradients are from the plain one's, and seconds that the first call took.

    Raises:
        SystemExit: where it is too far.
    """
    found, first, off = {}, {}, {}
    for name, rival in rivals.items():
        with tempfile.TemporaryDirectory() as empty:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            begun = time.perf_counter()
            found[name] = rival.gradients()
            first[name] = time.perf_counter() - begun
    loss, plain = found["plain"]
    for name, (own_loss, own) in found.items():
        off[name] = float((own - plain).norm() / plain.norm())
        if not (off[name] < 1e-4 and abs(own_loss / loss - 1) < 1e-5):
            raise SystemExit(f"{name}: gradients are off by {off[name]:.2g}")
    return off, first


def forget() -> None:
    """Nothing is compiled any more."""
    torch.compiler.reset()
    compiled._compiled.cache_clear()


def main() -> None:
    """Check, measure, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in given.sizes:
        forget()
        rivals = {name: Rival(size, name, given.vocabulary) for name in RIVALS}
        off, first = parity(rivals)
        calls = {name: rival.step for name, rival in rivals.items()}
        times = rounds(calls, given.repeats, warm_up=2)
        for name, seconds in times.items():
            made = summary(seconds)
            turns = zip(seconds, times["plain"], strict=True)
            rows.append(
                {
                    "size": size,
                    "rival": name,
                    "ms a step": 1e3 * made["median"],
                    "spread": made["spread"],
                    "of plain": statistics.median(a / b for a, b in turns),
                    "first call, s": first[name],
                    "gradients off by": off[name],
                }
            )
        print(json.dumps(rows[-len(RIVALS) :], indent=1), file=sys.stderr)
    facts = {"circumstances": circumstances(), "repeats": given.repeats, "rows": rows}
    save(given.out, "compiled", facts, table(rows))


if __name__ == "__main__":
    main()
