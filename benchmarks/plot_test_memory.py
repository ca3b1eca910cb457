"""Draw perplexity against the size of the memory in the test, from tables of test-memory.yaml.

Where there are several seeds, bars show the sample standard deviation.

python benchmarks/plot_test_memory.py --tables runs/ablations/test-memory/trials.csv --names latex
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAINED = {"": "after an eighth of the training", "longer-": "after as much training again"}
"""What the names of variants begin with, and how long their memory was trained with."""


def points(path: Path) -> dict[str, dict[int, list[float]]]:
    """By how a variant's name begins and its slots, the perplexities of all seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            named = re.fullmatch(rf"({'|'.join(TRAINED)})mem(\d+)", row["variant"])
            if named and row["perplexity"]:
                line = found.setdefault(named[1], {})
                line.setdefault(int(named[2]), []).append(float(row["perplexity"]))
    return found


def main() -> None:
    """Draw a panel for each table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/test_memory.png"))
    given = parser.parse_args()
    figure, _ = plt.subplots(1, len(given.tables), figsize=(5 * len(given.tables), 4))
    for axis, path, name in zip(figure.axes, given.tables, given.names, strict=True):
        found = points(path)
        if not found:
            raise SystemExit(f"{path} has no variant named mem and a number")
        for kind, line in found.items():
            sizes = sorted(line)
            means = [statistics.fmean(line[size]) for size in sizes]
            several = [line[size] if len(line[size]) > 1 else None for size in sizes]
            spreads = [math.nan if some is None else statistics.stdev(some) for some in several]
            axis.errorbar(sizes, means, spreads, marker="o", capsize=3, label=TRAINED[kind])
        axis.set_xscale("symlog", base=2, linthresh=256)
        ticks = sorted({slots for line in found.values() for slots in line})
        axis.set_xticks(ticks, [f"{slots:,}" for slots in ticks], rotation=45)
        axis.set(title=name, xlabel="slots of memory in the test", ylabel="perplexity")
        axis.grid(alpha=0.3)
        axis.legend()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
