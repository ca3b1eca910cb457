"""Draw perplexity against the size of the memory in the test, from tables of test-memory.yaml.

python benchmarks/plot_test_memory.py --tables runs/ablations/test-memory/trials.csv --names latex
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def points(path: Path) -> dict[int, list[float]]:
    """Perplexities of all seeds by slots, from the variants whose names are mem and a number."""
    found: dict[int, list[float]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            named = re.fullmatch(r"mem(\d+)", row["variant"])
            if named and row["perplexity"]:
                found.setdefault(int(named[1]), []).append(float(row["perplexity"]))
    return dict(sorted(found.items()))


def main() -> None:
    """Draw one line for each table."""
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
        means = [sum(some) / len(some) for some in found.values()]
        axis.plot(list(found), means, marker="o")
        axis.set_xscale("symlog", base=2, linthresh=256)
        ticks = list(found)
        axis.set_xticks(ticks, [f"{slots:,}" for slots in ticks], rotation=45)
        axis.set(title=name, xlabel="slots of memory in the test", ylabel="perplexity")
        axis.grid(alpha=0.3)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
