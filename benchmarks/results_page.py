"""Bring the tables of docs/results.md in line with the raw results next to it.

    python benchmarks/results_page.py

A cell is filled in by its row and its column. A row that begins with a `variant` is of the file
that the page last linked to above; one that begins with a link is of that file, and then a column
names the variant or speaks of all of them. Cells of other columns and rows stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
LINK = re.compile(r"\]\((results/ablations/[\w.-]+-table\.csv)\)")
Record = dict[str, str]
Records = dict[str, Record]
"""By variant."""


def figure(record: Record, key: str, form: str, scale: float = 1) -> str:
    """A mean, with its standard deviation over seeds where there are several."""
    if not record[key]:
        return ""
    text, spread = format(scale * float(record[key]), form), record.get(f"{key}_std")
    return f"{text} ± {format(scale * float(spread), form.lstrip('+'))}" if spread else text


def difference(record: Record) -> str:
    """Of the loss to the reference's, with its p-value."""
    if not record["loss_difference"]:
        return ""
    return f"{figure(record, 'loss_difference', '+.3f')} ({float(record['p_value']):.2g})"


OF_A_VARIANT: dict[str, Callable[[Record], str]] = {
    "perplexity": lambda record: figure(record, "perplexity", ".3f"),
    "accuracy %": lambda record: figure(record, "accuracy", ".1f", 100),
    "Δ loss (p)": difference,
    "step time": lambda record: figure(record, "train_step_ms_relative", ".2f"),
    "search ms": lambda record: figure(record, "eval_search_ms", ".0f"),
    "recall": lambda record: figure(record, "recall", ".3f"),
}


def total(records: Records, of: Callable[[Record], float]) -> float:
    """A sum over every run of a file, means being over seeds."""
    return sum(int(record["seeds"]) * of(record) for record in records.values())


def seconds(record: Record) -> float:
    """Of training and evaluation."""
    evaluated = float(record["tokens"] or 0) / float(record["eval_tokens_per_second"] or 1)
    return float(record["train_seconds"] or 0) + evaluated


OF_A_FILE: dict[str, Callable[[Records], str]] = {
    "no memory, no XL": lambda file: OF_A_VARIANT["perplexity"](file["no-memory-no-xl"]),
    "no memory, XL": lambda file: OF_A_VARIANT["perplexity"](file["no-memory"]),
    "memory, no XL": lambda file: OF_A_VARIANT["perplexity"](file["memory-no-xl"]),
    "memory, XL": lambda file: OF_A_VARIANT["perplexity"](file["memory"]),
    "Δ loss of memory with XL (p)": lambda file: difference(file["memory"]),
    "documents": lambda file: file["memory"]["documents"],
    "runs": lambda file: str(sum(int(record["seeds"]) for record in file.values())),
    "tokens trained": lambda file: (
        f"{total(file, lambda record: float(record['train_tokens'] or 0)) / 1e6:.1f} million"
    ),
    "hours": lambda file: f"{total(file, seconds) / 3600:.1f}",
}


def read(link: str) -> Records:
    """The records of a table, by variant."""
    with (PAGE.parent / link).open(encoding="utf-8") as file:
        return {record["variant"]: record for record in csv.DictReader(file)}


def refresh(page: str) -> str:
    """The page with every cell that has raw results filled in from them.

    Raises:
        KeyError: where a table names a variant that its file does not hold.
        ValueError: where no file is linked to above a variant.
    """
    lines: list[str] = []
    head: list[str] = []
    link: str | None = None
    for line in page.split("\n"):
        if not line.startswith("|"):
            head, found = [], LINK.findall(line)
            link = found[-1] if found else link
        elif not head:
            head = [text.strip() for text in line.strip("|").split("|")]
        else:
            line = _row(line, head, link)
        lines.append(line)
    return "\n".join(lines)


def _row(line: str, head: list[str], link: str | None) -> str:
    cells = [text.strip() for text in line.strip().strip("|").split("|")]
    named, own = re.fullmatch(r"`(.+)`", cells[0]), LINK.search(cells[0])
    if named and link is None:
        raise ValueError(f"no link to a table above the row of {named[1]}")
    if named and link:
        record = read(link)[named[1]]
        fill = {name: make(record) for name, make in OF_A_VARIANT.items()}
    elif own:
        records = read(own[1])
        fill = {name: make(records) for name, make in OF_A_FILE.items() if name in head}
    else:
        return line
    cells[1:] = [fill.get(name, text) for name, text in zip(head[1:], cells[1:], strict=True)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Rewrite the page."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(refresh(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
