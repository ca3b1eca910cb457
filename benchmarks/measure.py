"""Timing rivals against each other, and writing down what came of it."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")


def interleaved(
    rivals: Mapping[Name, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of each rival, all of them once a round, so that noise strikes them alike.

    On a busy machine let ``clock`` be ``time.process_time`` and use one thread: waiting for the
    others then does not count.
    """

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def seconds() -> float:
            start = clock()
            call()
            return clock() - start

        return seconds

    return rounds({name: timed(call) for name, call in rivals.items()}, repeats, warm_up)


def rounds(
    rivals: Mapping[Name, Callable[[], float]], repeats: int, warm_up: int = 1
) -> dict[Name, list[float]]:
    """Likewise, where each call returns its own seconds."""
    for call in rivals.values():
        for _ in range(warm_up):
            call()
    seconds: dict[Name, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, call in rivals.items():
            seconds[name].append(call())
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and spread (interquartile range over median) of some repeats."""
    median = statistics.median(seconds)
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return {"median": median, "least": min(seconds), "spread": (quarters[2] - quarters[0]) / median}


def circumstances() -> dict[str, Any]:
    """Hardware, versions and how busy the machine is: without them a figure means nothing."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(": ")[1]
    packages = {name: _version(name) for name in ("torch", "faiss-cpu", "numpy")}
    load = Path("/proc/loadavg").read_text().split()[0]
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load before": float(load),
        "python": platform.python_version(),
        **packages,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # not every benchmark needs every one of them
        return "not installed"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [
            "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
            for x in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(folder: Path, name: str, facts: dict[str, Any], markdown: str) -> None:
    """Write ``name.json`` and ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown + "\n")
    print(markdown)
