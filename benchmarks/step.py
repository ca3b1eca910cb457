"""Time of a whole training step: with memory and without, and against the PyTorch port of the idea.

    python benchmarks/step.py

Forward, loss, backward, optimiser step and commit, of a byte model: 6 layers of width 512, 8 heads
of 64, one key/value head, 2 rows of 512 tokens, an XL cache of 512, k = 32. Both models are first
trained for a while on Python's standard library and their memories filled by reading on; that takes
minutes, is kept in ``--out`` and made again when the settings change. The peer,
``memorizing-transformers-pytorch``, is installed into an environment of its own, also in ``--out``.

Parity and recall come before any time: exact search must give the loss and the gradients of the
reference search, and bf16-mixed must stay near them. All rivals take turns, round by round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import matplotlib
import numpy as np
import step_shape as shape
import torch
from measure import circumstances, rounds, save, summary, table
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing_transformers.memory import MemoryBank, make_search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.estimate import estimate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "bf16-mixed")


def config(slots: int) -> ModelConfig:
    """Our model in the shape of the benchmark."""
    memory = MemoryConfig(size=slots, top_k=shape.TOP_K, layers=[shape.MEMORY_LAYER])
    return ModelConfig(
        vocab_size=shape.VOCABULARY,
        d_model=shape.D_MODEL,
        num_layers=shape.LAYERS,
        num_heads=shape.HEADS,
        num_kv_heads=1,
        head_dim=shape.HEAD_WIDTH,
        xl_cache=shape.XL_CACHE,
        memory=memory,
    )


def write_tokens(path: Path, length: int) -> None:
    """Bytes (rows, length) of Python's standard library, file after file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    if len(text) < shape.ROWS * length:
        raise SystemExit(f"the standard library has {len(text)} bytes, not {shape.ROWS * length}")
    tokens = np.frombuffer(text, dtype=np.uint8)[: shape.ROWS * length]
    np.save(path, tokens.reshape(shape.ROWS, length))


class Ours:
    """Our model, and a full bank for each rival.

    Args:
        folder: where what was trained and filled lies.
        clock: gives seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.folder, self.clock = folder, clock
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype("int64"))
        torch.manual_seed(0)
        self.net = Transformer(config(shape.TRAINING_SLOTS))
        self.attention = self.net.layers[shape.MEMORY_LAYER].attention
        self.attention.search = make_search("auto")

    def segment(self, start: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, N)."""
        stop = start + shape.SEGMENT
        return self.tokens[:, start:stop], self.tokens[:, start + 1 : stop + 1]

    def read(self, bank: MemoryBank, start: int, bf16: bool = False) -> tuple[Tensor, Any]:
        """The loss of a segment, and all that forward gave."""
        inputs, targets = self.segment(start)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = self.net(inputs, bank)
            return self.net.loss(output.logits, targets), output

    def update(
        self, bank: MemoryBank, start: int, optimizer: torch.optim.Optimizer, bf16: bool = False
    ) -> float:
        """One training step; returns its loss."""
        loss, output = self.read(bank, start, bf16)
        bank.commit(output.pairs, token_ids=self.segment(start)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(self, steps: int) -> dict[str, Any]:
        """Train from the start."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=shape.TRAINING_LR)
        bank = self.net.new_memory(shape.ROWS)
        losses = [self.update(bank, step * shape.SEGMENT, optimizer) for step in range(steps)]
        torch.save(self.net.state_dict(), self.folder / "ours.pt")
        parameters = sum(weight.numel() for weight in self.net.parameters())
        return {"parameters": parameters, "loss": float(np.mean(losses[-20:] or [np.nan]))}

    def new_bank(self, slots: int) -> MemoryBank:
        """An empty bank."""
        self.net.config.memory.size = slots
        return self.net.new_memory(shape.ROWS)

    @torch.no_grad()
    def fill(self, start: int, slots: int) -> None:
        """Read on until the memory is full, and save it."""
        self.net.load_state_dict(torch.load(self.folder / "ours.pt", weights_only=True))
        bank = self.new_bank(slots)
        for here in range(start, start + slots, shape.SEGMENT):
            _, output = self.read(bank, here)
            bank.commit(output.pairs, token_ids=self.segment(here)[0])
        save_file(bank.tensors(), self.folder / "ours.safetensors")

    def load(self) -> None:
        """Make ready to step."""
        self.net.load_state_dict(torch.load(self.folder / "ours.pt", weights_only=True))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=shape.MEASURING_LR)
        self.saved = load_file(self.folder / "ours.safetensors")

    def full_bank(self, slots: int) -> MemoryBank:
        """A bank whose memory is full; of a larger one it has the newest pairs."""
        bank = self.new_bank(slots)
        bank.load(self.saved)
        return bank

    def rival(self, slots: int, name: str, bf16: bool, start: int) -> Callable[[], float]:
        """A call that makes one step on its own bank and returns its seconds."""
        bank, search = self.full_bank(slots), make_search(name)
        position = iter(range(start, self.tokens.shape[1] - shape.SEGMENT, shape.SEGMENT))

        def step() -> float:
            self.attention.search = search
            here = next(position)
            begun = self.clock()
            self.update(bank, here, self.optimizer, bf16)
            return self.clock() - begun

        return step

    @torch.no_grad()
    def recall(self, slots: int, name: str, start: int) -> float:
        """Share of the true neighbours that a search finds for the next segment's queries."""
        bank, search = self.full_bank(slots), make_search(name)
        self.attention.search = search
        _, output = self.read(bank, start)
        queries = output.retrievals[shape.MEMORY_LAYER].queries
        queries = queries.reshape(shape.ROWS, 1, -1, shape.HEAD_WIDTH)
        memory = bank.memories[shape.MEMORY_LAYER]
        return measured_recall(search, queries, memory, shape.TOP_K, sample=queries.shape[2])

    def parity(self, slots: int, start: int) -> dict[str, float]:
        """How far exact search and bf16-mixed are from the reference search in fp32.

        Raises:
            SystemExit: where they are too far.
        """
        losses, gradients = {}, {}
        for name, search, bf16 in (
            ("reference", "reference", False),
            ("exact", "exact", False),
            ("bf16-mixed", "exact", True),
        ):
            self.attention.search = make_search(search)
            loss, _ = self.read(self.full_bank(slots), start, bf16)
            made = torch.autograd.grad(loss, list(self.net.parameters()))
            losses[name], gradients[name] = loss.item(), torch.cat([x.flatten() for x in made])
        found = {}
        for name, allowed in (("exact", 1e-4), ("bf16-mixed", 0.05)):
            difference = gradients[name] - gradients["reference"]
            off = float(difference.norm() / gradients["reference"].norm())
            found[f"{name}: loss off by"] = abs(losses[name] / losses["reference"] - 1)
            found[f"{name}: gradients off by"] = off
            if not off < allowed:
                raise SystemExit(f"{name}: gradients are off by {off:.2g}, allowed {allowed}")
        return found


class Peer:
    """The other side of ``peer_step.py``."""

    def __init__(self, python: Path, folder: Path, busy: bool) -> None:
        given = {"folder": str(folder), "busy": busy, "threads": torch.get_num_threads()}
        self.process = subprocess.Popen(
            [str(python), str(HERE / "peer_step.py"), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **command: Any) -> dict[str, Any]:
        """Have a command carried out.

        Raises:
            SystemExit: where the peer died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def must(self, **command: Any) -> dict[str, Any]:
        """Likewise, and it must succeed."""
        answer = self(**command)
        if "error" in answer:
            raise SystemExit(f"the peer failed to {command['do']}: {answer['error']}")
        return answer


def peer_environment(folder: Path) -> Path:
    """The peer's interpreter; its environment borrows torch, numpy and faiss from this one."""
    python = folder / "bin" / "python"
    needed = HERE / "peer_requirements.txt"
    stamp = folder / needed.name
    if not stamp.exists() or stamp.read_text() != needed.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(needed)]
        subprocess.run(install, check=True)
        find = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
        Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        stamp.write_text(needed.read_text())
    return python


def prepare(
    folder: Path, ours: Callable[[], Ours], peer: Callable[[], Peer], settings: dict[str, Any]
) -> dict[str, Any]:
    """Train both models and fill their memories, unless that was done."""
    done = folder / "prepared.json"
    facts: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    if facts.get("settings") == settings:
        return facts
    print("training both models and filling their memories: minutes", file=sys.stderr)
    done.unlink(missing_ok=True)
    slots, steps = settings["slots"], settings["train_steps"]
    room = steps + 2 + max(slots) // shape.SEGMENT + settings["steps"]
    write_tokens(folder / "tokens.npy", room * shape.SEGMENT + 1)
    start = steps * shape.SEGMENT
    mine, theirs = ours(), peer()
    facts = {"settings": settings, "ours": mine.train(steps)}
    mine.fill(start, max(slots))
    facts["peer"] = theirs.must(do="train", steps=steps)
    theirs.must(do="fill", start=start, slots=slots)
    done.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def matrix_product(clock: Callable[[], float]) -> Callable[[], float]:
    """A call that times the product of a feed-forward layer, 20 times over."""
    tokens = torch.randn(shape.ROWS * shape.SEGMENT, shape.D_MODEL)
    weight = torch.randn(4 * shape.D_MODEL, shape.D_MODEL)
    out = torch.empty(len(tokens), len(weight))

    def step() -> float:
        begun = clock()
        for _ in range(20):
            torch.mm(tokens, weight.T, out=out)
        return (clock() - begun) / 20

    return step


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Seconds a step against slots, a line for each rival."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for precision, axis in zip(PRECISIONS, axes, strict=True):
        chosen = [r for r in rows if r["precision"] == precision or r["model"] == "peer"]
        for name in dict.fromkeys((r["model"], r["search"]) for r in chosen):
            own = [r for r in chosen if (r["model"], r["search"]) == name]
            slots, seconds = [r["slots"] for r in own], [r["s a step"] for r in own]
            axis.plot(slots, seconds, marker="o", label=" ".join(name))
        axis.set(title=precision + " (peer: fp32)", xlabel="slots", ylabel="s a training step")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds: what slows the machine for a while strikes both alike."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def figures(
    times: dict[tuple[str, int, str, str], list[float]],
    recall: dict[tuple[str, int, str], float],
) -> Iterator[dict[str, Any]]:
    """A row for each rival; bf16-mixed is held against the peer's fp32."""
    tokens = shape.ROWS * shape.SEGMENT
    for (model, slots, search, precision), seconds in times.items():
        peer = times.get(("peer", slots, "hnsw", "fp32"))
        without = times["ours", 0, "none", precision]
        found = summary(seconds)
        yield {
            "slots": slots,
            "model": model,
            "search": search,
            "precision": precision,
            "s a step": found["median"],
            "least": found["least"],
            "spread": found["spread"],
            "tokens/s": tokens / found["median"],
            "times the peer": ratio(peer, seconds) if peer else None,
            "of ours without": ratio(seconds, without) if model == "ours" else None,
            "recall": recall.get((model, slots, search)),
        }


def main() -> None:
    """Prepare, check, measure, write JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[8192, 65536])
    searches = ["exact", "bucketed", "auto", "faiss-ivf"]
    parser.add_argument("--searches", nargs="+", default=searches)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train_steps", type=int, default=200, help="before the memory is filled")
    parser.add_argument("--prepare", action="store_true", help="train and fill, measure nothing")
    parser.add_argument("--no_peer", action="store_true", help="measure ours only")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, processor time: for a machine in use"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    clock = time.process_time if given.busy else time.perf_counter
    if given.busy:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    folder = given.out / "step"
    folder.mkdir(parents=True, exist_ok=True)
    python = peer_environment(given.out / "peer-environment")
    code = hashlib.sha256((HERE / "step_shape.py").read_bytes()).hexdigest()[:12]
    settings = {
        "shape": code,
        "train_steps": given.train_steps,
        "slots": sorted(given.slots),
        "steps": 64,
    }
    prepared = prepare(
        folder, lambda: Ours(folder, clock), lambda: Peer(python, folder, given.busy), settings
    )
    if given.prepare:
        return

    ours = Ours(folder, clock)
    ours.load()
    start = (given.train_steps + max(given.slots) // shape.SEGMENT) * shape.SEGMENT
    facts: dict[str, Any] = {
        "circumstances": circumstances(),
        "clock": clock.__name__,
        "prepared": prepared,
        "parity": ours.parity(min(given.slots), start),
    }
    rivals: dict[tuple[str, int, str, str], Callable[[], float]] = {
        ("ours", 0, "none", precision): ours.rival(0, "exact", precision != "fp32", start)
        for precision in PRECISIONS
    }
    recall: dict[tuple[str, int, str], float] = {}
    for slots in given.slots:
        for search in given.searches:
            recall["ours", slots, search] = ours.recall(slots, search, start)
            for precision in PRECISIONS:
                rival = ours.rival(slots, search, precision != "fp32", start)
                rivals["ours", slots, search, precision] = rival
    if not given.no_peer:
        peer = Peer(python, folder, given.busy)
        for slots in given.slots:
            peer.must(do="load", slots=slots)
            recall["peer", slots, "hnsw"] = peer.must(do="recall", slots=slots)["recall"]
            rivals["peer", slots, "hnsw", "fp32"] = lambda slots=slots: peer.must(
                do="step", slots=slots
            )["seconds"]
        rounded = peer(do="step", slots=min(given.slots), bf16=True)
        facts["peer in bf16-mixed"] = rounded.get("error", "runs")
    print(json.dumps({**facts, "recall": {" ".join(map(str, k)): v for k, v in recall.items()}}))
    rivals["matrix product", 0, "none", "fp32"] = matrix_product(clock)

    times = rounds(rivals, given.repeats)
    product = statistics.median(times.pop(("matrix product", 0, "none", "fp32")))
    flops = 2 * shape.ROWS * shape.SEGMENT * 4 * shape.D_MODEL**2
    cost = estimate(config(max(given.slots)), shape.ROWS, shape.SEGMENT)
    facts["matrix product, GFLOP/s"] = flops / product / 1e9
    facts["fp32 floor without memory, s"] = cost.model_flops * product / flops
    facts["rows"] = list(figures(times, recall))
    facts["seconds"] = {" ".join(map(str, name)): x for name, x in times.items()}
    lines = [
        f"{key}: {value}"
        for key, value in facts.items()
        if key not in ("rows", "prepared", "seconds")
    ]
    save(given.out, "step", facts, "\n\n".join([*lines, table(facts["rows"])]))
    plot(facts["rows"], given.out / "step.png")


if __name__ == "__main__":
    main()
