"""Where the time of a training step goes, by torch's profiler; after ``step.py --prepare``.

    python benchmarks/step_profile.py --slots 0 8192 65536

Milliseconds of two training steps' mean, by operator, each less the operators that it calls. The
line "not in torch" is Python, numpy's sort and the profiler itself.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import step_shape as shape
from measure import circumstances, save, table
from step_ours import Ours
from torch.profiler import ProfilerActivity, profile

STEPS = 2
GROUPS = {
    "products of weights (mm)": ("aten::mm", "aten::addmm"),
    "products of attention (bmm)": ("aten::bmm", "aten::baddbmm"),
    "scan of the memory in int8 (_int_mm)": ("aten::_int_mm",),
    "maxima of its buckets (amax)": ("aten::amax", "aten::fill_"),
    "gathers (index_select, gather, embedding_bag)": (
        "aten::index_select",
        "aten::gather",
        "aten::index",
        "aten::_embedding_bag",
    ),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
}


def by_group(step: Any) -> dict[str, float]:
    """Milliseconds a step of each group of operators."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        whole = 1e3 * (time.perf_counter() - begun) / STEPS
    own = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in found.key_averages()}
    groups = {name: sum(own.pop(key, 0.0) for key in keys) for name, keys in GROUPS.items()}
    groups["all other operators"] = sum(own.values())
    groups["not in torch"] = whole - sum(groups.values())
    return {**groups, "whole": whole}


def main() -> None:
    """Profile, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 8192, 65536])
    parser.add_argument("--search", default="auto")
    parser.add_argument("--train_steps", type=int, default=200, help="as given to step.py")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    folder = given.out / "step"
    if not (folder / "prepared.json").exists():
        raise SystemExit(f"{folder} holds nothing: first python benchmarks/step.py --prepare")
    ours = Ours(folder, time.perf_counter)
    ours.load()
    start = (given.train_steps + max(given.slots) // shape.SEGMENT) * shape.SEGMENT
    columns = {
        (slots, precision): by_group(ours.rival(slots, given.search, precision != "fp32", start))
        for slots in given.slots
        for precision in ("fp32", "bf16-mixed")
    }
    names = next(iter(columns.values()))
    rows = [
        {"ms": name, **{f"{s} {p}": round(column[name]) for (s, p), column in columns.items()}}
        for name in names
    ]
    facts = {"circumstances": circumstances(), "steps": STEPS, "rows": rows}
    save(given.out, "step_profile", facts, table(rows))


if __name__ == "__main__":
    main()
