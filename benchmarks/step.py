"""Time of a complete training step: with memory, without, and of the PyTorch port of the idea.

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
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import matplotlib
import numpy as np
import step_shape as shape
import torch
from measure import circumstances, rounds, save, summary, table
from step_ours import Ours, config

from memorizing_transformers.memory import SEARCHES
from memorizing_transformers.training.estimate import estimate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "bf16-mixed")
STEPS = 64
"""Segments that are kept for the steps of each rival."""


def write_tokens(path: Path, length: int) -> None:
    """Bytes (rows, length) of Python's standard library, file after file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    if len(text) < shape.ROWS * length:
        raise SystemExit(f"the standard library has {len(text)} bytes, not {shape.ROWS * length}")
    tokens = np.frombuffer(text, dtype=np.uint8)[: shape.ROWS * length]
    np.save(path, tokens.reshape(shape.ROWS, length))


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
    folder: Path,
    ours: Callable[[], Ours],
    peer: Callable[[], Peer] | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train the models and fill their memories, unless that was done; ``peer`` may be missing."""
    done = folder / "prepared.json"
    facts: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    if facts.get("settings") == settings and (peer is None or "peer" in facts):
        return facts
    print("training models and filling their memories: minutes", file=sys.stderr)
    done.unlink(missing_ok=True)
    slots, steps = settings["slots"], settings["train_steps"]
    room = steps + 2 + max(slots) // shape.SEGMENT + settings["steps"]
    write_tokens(folder / "tokens.npy", room * shape.SEGMENT + 1)
    start = steps * shape.SEGMENT
    mine = ours()
    facts = {"settings": settings, "ours": mine.train(steps)}
    mine.fill(start, max(slots))
    if peer is not None:
        theirs = peer()
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
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure, axes = plt.subplots(
        1, len(precisions), figsize=(5.5 * len(precisions), 4), sharey=True, squeeze=False
    )
    for precision, axis in zip(precisions, axes[0], strict=True):
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
        without = times["ours", 0, "none", precision] if model == "ours" else None
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
            "of ours without": ratio(seconds, without) if without else None,
            "recall": recall.get((model, slots, search)),
        }


def main() -> None:
    """Prepare, check, measure, write JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="bf16-mixed is many times slower on a CPU without instructions for it",
    )
    searches = ["exact", "bucketed", "auto", "faiss-ivf"]
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=searches)
    parser.add_argument("--repeats", type=int, default=7, help=f"at most {STEPS}")
    parser.add_argument("--train_steps", type=int, default=200, help="before the memory is filled")
    parser.add_argument("--prepare", action="store_true", help="train and fill, measure nothing")
    parser.add_argument("--no_peer", action="store_true", help="prepare and measure ours only")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, processor time: for a machine in use"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    for slots in given.slots:
        # Memories are filled by whole segments; a part of one would be read twice.
        if slots < 1 or slots % shape.SEGMENT:
            parser.error(f"--slots {slots}: must be a multiple of {shape.SEGMENT}")
    if not 1 <= given.repeats <= STEPS:
        parser.error(f"--repeats {given.repeats}: must lie between 1 and {STEPS}")
    clock = time.process_time if given.busy else time.perf_counter
    if given.busy:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    folder = given.out / "step"
    folder.mkdir(parents=True, exist_ok=True)
    peer_of: Callable[[], Peer] | None = None
    if not given.no_peer:
        python = peer_environment(given.out / "peer-environment")
        peer_of = partial(Peer, python, folder, given.busy)
    code = hashlib.sha256((HERE / "step_shape.py").read_bytes()).hexdigest()[:12]
    settings = {
        "shape": code,
        "train_steps": given.train_steps,
        "slots": sorted(given.slots),
        "steps": STEPS,
    }
    prepared = prepare(folder, partial(Ours, folder, clock), peer_of, settings)
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
        for precision in given.precisions
    }
    recall: dict[tuple[str, int, str], float] = {}
    for slots in given.slots:
        for search in given.searches:
            recall["ours", slots, search] = ours.recall(slots, search, start)
            for precision in given.precisions:
                rival = ours.rival(slots, search, precision != "fp32", start)
                rivals["ours", slots, search, precision] = rival
    if peer_of is not None:
        peer = peer_of()
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
    cost = estimate(config(max(given.slots)), shape.ROWS, shape.SEGMENT, device="cpu")
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
