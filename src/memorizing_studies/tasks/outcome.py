"""Writes the results: tables as Markdown, CSV and JSON, plots, TensorBoard, one page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from .drawing import draw, write_tensorboard
from .summary import Row
from .task import Task
from .web_page import render


@dataclass(frozen=True)
class Outcome:
    """All results of a run."""

    facts: Mapping[str, Any]
    """What was run: model, control, data, seed and so on."""
    tasks: Sequence[Task]
    """Those that have items."""
    rows: Sequence[Row]
    skipped: Mapping[str, Mapping[str, int]]
    """By task, or ``documents``: how many were skipped, by the reason."""
    cautions: Sequence[str] = ()
    """Sentences about what the figures do not show."""

    def of(self, task: Task) -> list[Row]:
        """The rows of a task."""
        return [row for row in self.rows if row.task == task.name]

    def skips(self) -> list[str]:
        """A line for each reason why something was skipped."""
        return [
            f"{name}: {count:,} skipped ({reason})"
            for name, reasons in self.skipped.items()
            for reason, count in reasons.items()
            if count
        ]


def number(row: Row | None) -> str:
    """A figure with its interval, as text."""
    if row is None:
        return ""
    percent = row.measure == "accuracy"

    def one(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.3f}"

    interval = "" if row.low is None or row.high is None else f" [{one(row.low)}, {one(row.high)}]"
    return one(row.value) + interval


def table_of(rows: Sequence[Row], measure: str, axis: str) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table of one measure: a line for each group and place.

    Args:
        rows: of one task.
        measure: which of its measures.
        axis: what the places are.
    """
    own = [row for row in rows if row.measure == measure]
    arms = list(dict.fromkeys(row.arm for row in own))
    cells = {(row.group, row.x, row.arm): row for row in own}
    places = list(dict.fromkeys((row.group, row.x) for row in own))
    lines = []
    for group, x in places:
        found = [cells.get((group, x, arm)) for arm in arms]
        count = next(row.items for row in found if row is not None)
        where = "all" if x is None else f"{x:,}"
        lines.append([group, where, f"{count:,}", *map(number, found)])
    return ["items", axis, "count", *arms], lines


def overview(task: Task, rows: Sequence[Row]) -> Table:
    """A table for the terminal: all places together, of the measure that the plot shows."""
    whole = [row for row in rows if row.x is None]
    heads, lines = table_of(whole, task.measure, task.axis)
    table = Table(title=f"{task.title}: {UNITS[task.measure]}", title_justify="left")
    for head in heads:
        if head != task.axis:
            table.add_column(head, justify="left" if head == "items" else "right")
    for line in lines:
        table.add_row(line[0], *line[2:])
    return table


UNITS = {
    "accuracy": "Accuracy, %",
    "reciprocal rank": "Reciprocal rank (mean)",
    "nats": "Loss, nats: of the right answer, or for each token of a part (mean over items)",
    "perplexity": "Perplexity",
}
"""Headings of the measures."""
NOTE = (
    "In brackets: intervals of 95 % over items (Wilson's for accuracies, else a bootstrap; "
    "differences are paired). Items of one document depend on each other, so the true intervals "
    "are wider."
)


def markdown(outcome: Outcome) -> str:
    """All tables as Markdown."""
    parts = ["# Tasks", "\n".join(f"- {key}: {value}" for key, value in outcome.facts.items())]
    for task in outcome.tasks:
        parts += [f"## {task.title}", task.shows]
        for measure, title in UNITS.items():
            heads, lines = table_of(outcome.of(task), measure, task.axis)
            if lines:
                table = [heads, ["---"] * len(heads), *lines]
                escaped = (" | ".join(c.replace("|", r"\|") for c in line) for line in table)
                parts += [f"### {title}", "\n".join(f"| {line} |" for line in escaped)]
    parts += [NOTE, *outcome.cautions]
    parts += ["\n".join(f"- {line}" for line in outcome.skips())] if outcome.skips() else []
    return "\n\n".join(parts) + "\n"


def write_outcome(outcome: Outcome, out: Path) -> None:
    """Write ``table.md``, ``table.csv``, ``table.json``, ``index.html``, a plot for each task and
    ``tensorboard/``.

    Args:
        outcome: the results.
        out: a folder that is there.
    """
    (out / "table.md").write_text(markdown(outcome), "utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in outcome.rows)
    whole = {
        "facts": dict(outcome.facts),
        "skipped": {name: dict(reasons) for name, reasons in outcome.skipped.items()},
        "rows": [asdict(row) for row in outcome.rows],
    }
    (out / "table.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False), "utf-8")
    figures = {task.name: draw(task, outcome.of(task)) for task in outcome.tasks}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    write_tensorboard(out / "tensorboard", outcome.rows, figures)
    sections = [
        {
            "name": task.name,
            "title": task.title,
            "shows": task.shows,
            "tables": [
                (title, *table_of(outcome.of(task), measure, task.axis))
                for measure, title in UNITS.items()
                if any(row.measure == measure for row in outcome.of(task))
            ],
        }
        for task in outcome.tasks
    ]
    page = render(outcome.facts, sections, figures, [NOTE, *outcome.cautions, *outcome.skips()])
    (out / "index.html").write_text(page, "utf-8", newline="\n")
