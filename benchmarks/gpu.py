"""All that waits for a GPU, in one command; no part begins after eight minutes.

    python benchmarks/gpu.py

It runs the tests marked ``gpu``, compares the device with the CPU, and measures searches, training
steps (12 layers of width 1,024, 32 rows of 512 tokens, bf16-mixed), peak memory and a profile. It
writes ``gpu.json``, ``gpu.md``, ``gpu.png`` and ``gpu_profile.txt`` to ``--out`` as it goes: a run
that is stopped keeps what it has.

``--rehearse`` does the same with tiny sizes on the CPU, and tests that the command works.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_parts as parts
import gpu_rows
import matplotlib
import torch
from measure import circumstances, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
GOALS = (
    "Goals: a step with 65,536 slots at most 1.25 times one without memory, with 262,144 at most "
    "1.6; recall at least 0.95."
)

TEST_SECONDS = 150.0
"""After these the tests are stopped, so that the other parts have the rest."""


def gpu_tests() -> list[str]:
    """The files of tests that have the mark ``gpu``.

    To import all the others takes time, and may need packages that this machine does not have.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(x.relative_to(ROOT)) for x in files if "mark.gpu" in x.read_text("utf-8")]


def run_tests(seconds: float) -> Iterator[dict[str, Any]]:
    """The tests that need a GPU, and how they ended."""
    pytest = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-o", "addopts="]
    command = [*pytest, "--continue-on-collection-errors", *gpu_tests()]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        # What it had said comes as bytes, whatever was asked for.
        said = late.stdout or b""
        lines = (said.decode(errors="replace") if isinstance(said, bytes) else said).splitlines()
        passed = sum(" PASSED" in line for line in lines)
        yield {"tests": f"not done after {seconds:.0f} s: {passed} passed so far"}
        yield from ({"tests": line} for line in lines if " FAILED" in line or " ERROR" in line)
        return
    lines = ended.stdout.strip().splitlines()
    yield {"tests": lines[-1].strip("= ") if lines else ended.stderr.strip()[-300:]}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"tests": line}


def devices(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found = {**circumstances(), "machine": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu memory GiB"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def plot(facts: dict[str, Any], target: Path) -> None:
    """Search and step times against slots."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    # Some rows only say that memory or time ran out.
    searches, steps = (
        [row for row in facts.get(part, []) if row.get("ms") is not None]
        for part in ("searches", "steps")
    )
    for row_kind in dict.fromkeys((r["search"], r["dtype"]) for r in searches):
        own = [r for r in searches if (r["search"], r["dtype"]) == row_kind]
        left.plot(
            [r["slots"] for r in own], [r["ms"] for r in own], marker="o", label=" ".join(row_kind)
        )
    kinds = ("optimizer", "compiled", "place")
    for kind in dict.fromkeys(tuple(r[k] for k in kinds) for r in steps):
        own = [r for r in steps if tuple(r[k] for k in kinds) == kind]
        label = f"{kind[0]}{', compiled' if kind[1] else ''}, memory on the {kind[2]}'s device"
        label = label.replace("cpu's device", "host")
        right.plot([r["slots"] for r in own], [r["ms"] for r in own], marker="o", label=label)
    left.set(xscale="log", yscale="log", xlabel="slots", ylabel="ms a search")
    right.set(xlabel="slots (0: no memory)", ylabel="ms a training step")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        if axis.lines:
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def write(facts: dict[str, Any], out: Path) -> None:
    """JSON, Markdown and plot of what is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(facts, indent=2) + "\n")
    tables = [
        f"## {name}\n\n{table(rows)}"
        for name, rows in facts.items()
        if isinstance(rows, list) and rows
    ]
    head = f"{facts['circumstances']}\n\n{facts['shape']}\n\n{GOALS}"
    (out / "gpu.md").write_text("\n\n".join([head, *tables]) + "\n")
    plot(facts, out / "gpu.png")


def main() -> None:
    """Run every part that fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after this")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args()
    if not (given.rehearse or torch.cuda.is_available()):
        parser.exit(2, "gpu.py: no CUDA device here; --rehearse runs tiny sizes on the CPU\n")
    device = torch.device("cpu" if given.rehearse else "cuda")
    shape = gpu_rows.TINY if given.rehearse else gpu_rows.Shape()
    end = time.monotonic() + 60 * given.minutes
    facts: dict[str, Any] = {"circumstances": devices(device), "shape": str(shape)}
    profile = given.out / "gpu_profile.txt"

    def profiled() -> Iterator[dict[str, Any]]:
        profile.write_text(parts.where_time_goes(shape, device))
        yield {"table": profile.name}

    def left() -> float:
        return end - time.monotonic()

    order: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "parity": lambda: parts.parity(shape, device),
        "tests": lambda: run_tests(TEST_SECONDS),
        "steps": lambda: parts.steps(shape, device),
        "searches": lambda: parts.searches(shape, device),
        "profile": profiled,
    }
    for name, part in order.items():
        if left() < 0:
            facts.setdefault("not begun", []).append({"part": name, "why": "no time left"})
            write(facts, given.out)
            continue
        rows = facts.setdefault(name, [])
        try:
            for row in part():
                rows.append(row)
                print(name, row, flush=True)
                write(facts, given.out)
                if left() < 0:
                    rows.append({**dict.fromkeys(row), next(iter(row)): "no time left"})
                    break
        except Exception as error:  # of a kernel, or of a library: the other parts still count
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            facts.setdefault("failed", []).append({"part": name, "why": reason})
            print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
        write(facts, given.out)


if __name__ == "__main__":
    main()
