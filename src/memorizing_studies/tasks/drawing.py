"""Plots of tasks, and the same figures in TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .summary import ALL, CHANCE, Row
from .task import Task

COLUMNS = 3
MOST = 9
"""Groups that are drawn, at most."""
SUFFIX = ".tasks"
"""Ends the names of event files that are written here."""


def draw(task: Task, rows: Sequence[Row]) -> Figure:
    """The plot of a task: a panel for each group, a line for each arm.

    Args:
        task: whose measure is drawn.
        rows: all of the task.
    """
    own = [row for row in rows if row.measure == task.measure and " - " not in row.arm]
    groups = list(dict.fromkeys(row.group for row in own))
    groups = [group for group in groups if group != ALL or len(groups) == 1][:MOST]
    columns = max(1, min(COLUMNS, len(groups)))
    lines = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(1.5 + 3.6 * columns, 1 + 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for panel, group in zip(panels, groups, strict=False):
        _panel(panel, [row for row in own if row.group == group and row.x is not None])
        panel.set_title(group if group != ALL else task.title, fontsize=9)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    unit = "accuracy" if task.measure == "accuracy" else "loss, nats"
    figure.supylabel(unit, fontsize=9)
    figure.supxlabel(task.axis, fontsize=9)
    if len(panels) and panels[0].get_legend_handles_labels()[0]:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _panel(panel: Axes, rows: Sequence[Row]) -> None:
    places = sorted({row.x for row in rows if row.x is not None})
    at = {x: number for number, x in enumerate(places)}
    for number, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
        own = [row for row in rows if row.arm == arm]
        # Side by side, so that no interval hides another one.
        xs = [at[row.x] + 0.06 * number for row in own if row.x is not None]
        values = [row.value for row in own]
        if arm == CHANCE:
            panel.plot(xs, values, ":", color="gray", label=arm)
            continue
        spans = [
            [max(0.0, row.value - row.low) if row.low is not None else 0.0 for row in own],
            [max(0.0, row.high - row.value) if row.high is not None else 0.0 for row in own],
        ]
        panel.errorbar(xs, values, spans, fmt="o-", ms=3, lw=1, capsize=2, label=arm,
                       color=f"C{number}")  # fmt: skip
    panel.set_xticks(range(len(places)), [f"{x:,}" for x in places], rotation=30, fontsize=7)
    panel.grid(alpha=0.3)
    panel.tick_params(axis="y", labelsize=8)


def tag_of(*names: str) -> str:
    """A tag of TensorBoard."""
    return "/".join(re.sub(r"[^\w.-]+", "_", name).strip("_") for name in names)


def write_tensorboard(folder: Path, rows: Sequence[Row], figures: Mapping[str, Figure]) -> None:
    """A scalar for each row, its place as the step, and the plots as images.

    Args:
        folder: what was written here before is removed; logs of other programs stay.
        rows: of all tasks.
        figures: by task.
    """
    from torch.utils.tensorboard import SummaryWriter

    for file in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        file.unlink()
    with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
        for row in rows:
            place = "all" if row.x is None else "by_place"
            tag = tag_of(row.task, row.measure, place, row.group, row.arm)
            writer.add_scalar(tag, row.value, row.x or 0)
        for name, figure in figures.items():
            writer.add_figure(tag_of(name), figure, close=False)
