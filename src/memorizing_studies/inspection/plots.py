"""The report's plots, as SVG that takes its colours from the page around it.

Figures are made without pyplot, so that none stays open.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from .report import Report

INK, HELPED, HURT, SECOND = "#010101", "#010201", "#010301", "#010401"
PAGE_COLOURS = {
    INK: "currentColor",
    HELPED: "var(--helped)",
    HURT: "var(--hurt)",
    SECOND: "var(--second)",
}
"""Placeholders in the drawing and what the page puts there, so that it can be light or dark."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memorizing-transformers",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **{f"{thing}.color": INK for thing in ("text", "xtick", "ytick")},
    **{f"axes.{thing}color": INK for thing in ("edge", "label", "title")},
}
WIDTH = 8.2
"""Inches; the page scales figures."""
BINS = 120


def thousands(value: float, position: int | None = None) -> str:
    """A count of tokens, as in 12,288."""
    return f"{value:,.0f}"


def as_svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element, with the page's colours and no style sheet of its own."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for part in (
        r"<metadata>.*?</metadata>",
        r"<style[^>]*>.*?</style>",
        r" font-family: [^;\"]*;",
        r"(?<=<g) id=\"[^\"]*\"",
        r" (?:width|height)=\"[\d.]+pt\"",
    ):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    for drawn, shown in PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg


def _figure(height: float, columns: int = 1, **options: Any) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns, **options))


def binned(values: NDArray[Any], bins: int = BINS) -> tuple[NDArray[Any], NDArray[Any]]:
    """Middles and means of ``bins`` equal parts of values that belong to tokens 1 to L - 1."""
    edges = np.unique(np.linspace(1, len(values), min(bins, len(values) - 1) + 1).astype(int))
    means = np.add.reduceat(values[: edges[-1]], edges[:-1]) / np.diff(edges)
    return (edges[:-1] + edges[1:]) / 2, means


def gain_by_position(report: Report) -> str:
    """Mean gain in bits over the document, for each size."""
    figure, (axes,) = _figure(2.9)
    several = len(report.readings) > 1
    for trace, colour in zip(report.readings, (HELPED, SECOND), strict=False):
        middles, means = binned(report.gain(trace))
        label = f"memory of {trace.size:,}"
        axes.plot(middles, means, color=colour, linewidth=1.4, label=label)
        if not several:
            axes.fill_between(middles, means, where=means > 0, color=HELPED, alpha=0.22, lw=0)
            axes.fill_between(middles, means, where=means < 0, color=HURT, alpha=0.4, lw=0)
        if trace.size < len(report.tokens):
            axes.axvline(trace.size, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(xlabel="position in the document, tokens", ylabel="mean gain, bits a token")
    axes.set_xlim(0, len(report.tokens))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(axis="y")
    if several:
        axes.legend()
    return as_svg(figure)


def gain_histogram(report: Report) -> str:
    """How many tokens gained how much."""
    figure, (axes,) = _figure(2.6)
    edges = np.linspace(-12, 12, 97)
    middles = (edges[:-1] + edges[1:]) / 2
    if len(report.readings) == 1:
        (trace,) = report.readings
        counts, _ = np.histogram(np.clip(report.gain(trace)[1:], -12, 12), edges)
        colours = [HELPED if middle > 0 else HURT for middle in middles]
        axes.bar(middles, counts, width=np.diff(edges) * 0.9, color=colours)
    else:
        for trace, colour in zip(report.readings, (HELPED, SECOND), strict=False):
            counts, _ = np.histogram(np.clip(report.gain(trace)[1:], -12, 12), edges)
            axes.stairs(counts, edges, color=colour, label=f"memory of {trace.size:,}")
        axes.legend()
    axes.set_yscale("log")
    axes.set(xlabel="gain, bits (12 and more at the edges)", ylabel="tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(axis="y")
    return as_svg(figure)


def _share_of_heads(by_distance: NDArray[Any]) -> NDArray[Any]:
    total = by_distance.sum(-1, keepdims=True)
    return by_distance / np.where(total > 0, total, 1)


def even_distances(length: int, segment: int, size: int, edges: NDArray[Any]) -> NDArray[Any]:
    """(E - 1,) the share of each distance if every pair in the memory were as likely as another."""
    change = np.zeros(length + 1)
    for start in range(segment, length - 1, segment):
        fill = min(size, start)
        nearest = np.arange(1, min(segment, length - 1 - start) + 1)
        change[nearest] += 1 / fill
        change[nearest + fill] -= 1 / fill
    counts, _ = np.histogram(np.arange(length + 1), edges, weights=np.cumsum(change))
    return np.asarray(counts / counts.sum())


def distance_histogram(report: Report) -> str:
    """How far back the weight falls: the mean over heads, and each head of a single memory."""
    figure, (axes,) = _figure(2.9)
    used = np.zeros(len(report.readings[0].use.edges) - 1, dtype=bool)
    several = len(report.readings) > 1
    for trace, colour in zip(report.readings, (HELPED, SECOND), strict=False):
        heads = _share_of_heads(trace.use.by_distance).reshape(-1, len(trace.use.edges) - 1)
        mean = heads.mean(0)
        axes.stairs(mean, trace.use.edges, color=colour, linewidth=1.6, zorder=3)
        if not several:
            axes.stairs(mean, trace.use.edges, color=colour, fill=True, alpha=0.18)
            for head in heads:
                axes.stairs(head, trace.use.edges, color=colour, linewidth=0.6, alpha=0.45)
        even = even_distances(len(report.tokens), report.segment, trace.size, trace.use.edges)
        axes.stairs(even, trace.use.edges, color=INK, linewidth=1, linestyle=(0, (1, 1.5)))
        used |= (mean > 1e-4) | (even > 1e-4)
        if trace.size < len(report.tokens):
            axes.axvline(trace.size, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                f"memory of {trace.size:,}", (trace.size, 1), xycoords=("data", "axes fraction"),
                xytext=(4, -2), textcoords="offset points", va="top", color=colour, fontsize=9,
            )  # fmt: skip
    edges = report.readings[0].use.edges
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[used.argmax()], edges[len(used) - used[::-1].argmax()] * 1.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="distance behind the query, tokens", ylabel="softmax weight")
    axes.grid(axis="y")
    return as_svg(figure)


def gates(report: Report) -> str:
    """The share of the memory in each head's output: the learned gate, or what was measured."""
    trace = report.readings[-1]
    measured = trace.use.mean(trace.use.share)
    names, values, low, high = [], [], [], []
    for number, layer in enumerate(trace.layers):
        for head in range(measured.shape[1]):
            names.append(f"layer {layer} head {head}")
            gate = report.gates.get(layer)
            values.append(gate[head] if gate else measured[number, head])
            found = trace.shares[number, head][trace.positions[number, head, 0] >= 0]
            low.append(np.quantile(found, 0.1) if len(found) else 0.0)
            high.append(np.quantile(found, 0.9) if len(found) else 0.0)
    figure, (axes,) = _figure(0.9 + 0.22 * len(names))
    rows = np.arange(len(names))
    axes.barh(rows, values, height=0.55, color=HELPED, alpha=0.75)
    if not report.gates:
        axes.hlines(rows, low, high, color=INK, linewidth=1.2)
    for row, value in zip(rows, values, strict=True):
        edge = value if report.gates else max(value, high[row])
        axes.annotate(
            f"{value:.2f}", (edge, row), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.axvline(0.5, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 1.06), xlabel="share of the memory in the head's output")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    return as_svg(figure)


def _grid(axes: Axes, values: NDArray[Any], scale: float, form: str, layers: list[int]) -> None:
    """A cell a layer and head, as strong as its value is of ``scale``."""
    for row, of_layer in enumerate(values):
        for head, value in enumerate(of_layer):
            strength = float(min(value / scale, 1.0)) if scale else 0.0
            axes.add_patch(
                Rectangle(
                    (head - 0.47, row - 0.46), 0.94, 0.92, color=HELPED, lw=0,
                    alpha=0.06 + 0.7 * strength,
                )
            )  # fmt: skip
            if values.shape[1] <= 16:
                axes.text(head, row, form.format(value), ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(len(layers) - 0.5, -0.5), xlabel="head")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def mass(report: Report) -> str:
    """Mean mass on the memory by layer and head, and over how many neighbours it spreads."""
    trace = report.readings[-1]
    layers = list(trace.layers)
    figure, (left, right) = _figure(1.1 + 0.42 * len(layers), 2, sharey=True)
    # Of all queries, the first segment's too, which found nothing.
    predicted = trace.nats.shape[0] - 1
    share = trace.use.share / predicted
    _grid(left, share, 1.0, "{:.2f}", layers)
    left.set_title("mass on the memory")
    spread = trace.use.mean(trace.use.spread)
    _grid(right, spread, float(report.settings["memory"]["top_k"]), "{:.1f}", layers)
    right.set_title("neighbours that share it, effectively")
    return as_svg(figure)


def draw(report: Report) -> dict[str, str]:
    """Every figure of the report, by name."""
    with mpl.rc_context(STYLE):
        return {
            "gain_by_position": gain_by_position(report),
            "gain_histogram": gain_histogram(report),
            "distance_histogram": distance_histogram(report),
            "gates": gates(report),
            "mass": mass(report),
        }
