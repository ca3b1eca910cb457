"""The results of a plan: a table as Markdown and CSV, a plot, TensorBoard's HPARAMS page."""

from __future__ import annotations

import csv
import math
import shutil
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .json_files import read_json
from .paired_test import Difference, compare
from .plan import Plan
from .trial import Trial

FIGURES = (
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "loss",
    "recall",
    "train_tokens_per_second",
    "train_step_ms",
    "train_search_ms",
    "train_recall",
    "train_steps",
    "train_tokens",
    "train_seconds",
    "eval_tokens_per_second",
    "eval_step_ms",
    "eval_search_ms",
    "tokens",
    "parameters",
)
"""Figures of a trial, by their names in ``result.json``."""
RELATIVE = ("train_tokens_per_second", "train_step_ms", "eval_tokens_per_second", "eval_step_ms")
"""Figures that the table also shows as a multiple of the reference's."""


@dataclass
class Row:
    """The figures of a variant over its seeds."""

    name: str
    how: str
    mean: dict[str, float]
    spread: dict[str, float]
    """Sample standard deviation over seeds, if there are several and all figures are finite."""
    seeds: int
    of: int
    """The seeds of the plan."""
    counts: dict[str, int] = field(default_factory=dict)
    """By figure, the seeds that it is the mean of."""
    relative: dict[str, float] = field(default_factory=dict)
    """Figures of ``RELATIVE`` as multiples of the reference's."""
    difference: Difference | None = None
    compared: int = 0
    """The seeds that the difference is the mean of."""
    failures: tuple[str, ...] = ()


def make_rows(plan: Plan, trials: Sequence[Trial]) -> list[Row]:
    """A row for each variant, from the seeds that have finished.

    The difference to the reference is over the seeds that have finished for both."""
    by_place = {(trial.variant, trial.seed): trial for trial in trials}
    documents = {
        place: losses
        for place, trial in by_place.items()
        if trial.result is not None
        and (losses := read_json(trial.path / "documents.json")) is not None
    }
    rows = []
    for variant in plan.variants:
        own = [by_place[variant.name, seed] for seed in plan.seeds]
        results = [trial.result for trial in own]
        found = [result for result in results if result is not None]
        values = {f: [r[f] for r in found if r.get(f) is not None] for f in FIGURES}
        row = Row(
            name=variant.name,
            how=variant.run if variant.source is None else f"{variant.run}, from {variant.source}",
            mean={key: statistics.fmean(some) for key, some in values.items() if some},
            spread={
                key: statistics.stdev(some)
                for key, some in values.items()
                if len(some) > 1 and all(map(math.isfinite, some))
            },
            seeds=len(found),
            of=len(plan.seeds),
            counts={key: len(some) for key, some in values.items() if some},
            failures=tuple(f"seed {t.seed}: {t.failure}" for t in own if t.failure is not None),
        )
        both = [
            s for s in plan.seeds if {(variant.name, s), (plan.reference, s)} <= documents.keys()
        ]
        if variant.name != plan.reference and both:
            row.compared = len(both)
            row.difference = compare(
                [documents[variant.name, seed] for seed in both],
                [documents[plan.reference, seed] for seed in both],
            )
        rows.append(row)
    reference = next(row.mean for row in rows if row.name == plan.reference)
    for row in rows:
        keys = [key for key in RELATIVE if key in row.mean and reference.get(key)]
        row.relative = {key: row.mean[key] / reference[key] for key in keys}
    return rows


def _seeds(row: Row, count: int) -> str:
    """A mark of a mean over fewer seeds than the plan has, which compares unlike runs."""
    return f" ({count} of {row.of} seeds)" if count < row.of else ""


def _cell(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    if key not in row.mean:
        return ""
    text = format(scale * row.mean[key], form)
    spread = f" ± {format(scale * row.spread[key], form)}" if key in row.spread else ""
    return text + spread + _seeds(row, row.counts[key])


def _relative_cell(row: Row, key: str, form: str) -> str:
    multiple = f" ({row.relative[key]:.2f} x)" if key in row.relative else ""
    return _cell(row, key, form) + multiple


def markdown(plan: Plan, rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    heads = ["variant", "run", "perplexity", "bits per byte", "accuracy %", "Δ loss (p)",
             "training tokens/s", "step ms", "evaluation tokens/s", "search ms",
             "recall"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        difference = ""
        if row.difference is not None:
            loss, p_value, _, spread = row.difference
            spread_text = "" if spread is None else f" ± {spread:.4f}"
            difference = f"{loss:+.4f}{spread_text} ({p_value:.2g}){_seeds(row, row.compared)}"
        cells = [
            row.name,
            row.how if row.mean or not row.failures else "failed",
            _cell(row, "perplexity", ".3f"),
            _cell(row, "bits_per_byte", ".4f"),
            _cell(row, "accuracy", ".2f", 100),
            difference,
            _relative_cell(row, "train_tokens_per_second", ",.0f"),
            _relative_cell(row, "train_step_ms", ".1f"),
            _relative_cell(row, "eval_tokens_per_second", ",.0f"),
            _cell(row, "eval_search_ms", ".1f"),
            _cell(row, "recall", ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(map(str, plan.seeds))
    tests = [row.difference.documents for row in rows if row.difference is not None]
    notes = [
        f"Base: `{plan.base}`; split: {plan.split}; seeds: {seeds}; ± is the sample "
        "standard deviation over seeds.",
        f"Δ loss: nats per token against {plan.reference}, below 0 is better; p from a sign-flip "
        f"test over {tests[0] if tests else 0} documents, averaged over seeds. Empty if a "
        "variant did not read the same tokens.",
        "Search ms: per batch of the evaluation. Recall: of the evaluation.",
    ]
    failures = [f"- {row.name}, {why}" for row in rows for why in row.failures]
    parts = [f"# {Path(plan.out).resolve().name}", "\n".join(lines), *notes]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(failures))
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The table as CSV: means, spreads, multiples of the reference's, the paired test."""
    names = ["variant", "run", "seeds"]
    for key in FIGURES:
        names += [key, f"{key}_std"]
    names += [f"{key}_relative" for key in RELATIVE]
    names += ["loss_difference", "loss_difference_std", "p_value", "documents", "failures"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            record: dict[str, Any] = {"variant": row.name, "run": row.how, "seeds": row.seeds}
            record |= row.mean | {f"{key}_std": value for key, value in row.spread.items()}
            record |= {f"{key}_relative": value for key, value in row.relative.items()}
            if row.difference is not None:
                loss, p_value, documents, spread = row.difference
                record |= {"loss_difference": loss, "loss_difference_std": spread}
                record |= {"p_value": p_value, "documents": documents}
            writer.writerow({**record, "failures": "; ".join(row.failures)})


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """The raw results: a row for each variant and seed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ["variant", "seed", *FIGURES, "failure"], extrasaction="ignore"
        )
        writer.writeheader()
        for trial in trials:
            known = {"variant": trial.variant, "seed": trial.seed, "failure": trial.failure}
            writer.writerow({**(trial.result or {}), **known})


def draw(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """Plot the perplexity of each variant with its spread over seeds, the reference as a line."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if math.isfinite(row.mean.get("perplexity", math.nan))]
    figure = Figure(figsize=(8, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(shown):
        mean, spread = row.mean["perplexity"], row.spread.get("perplexity")
        axes.errorbar(mean, place, xerr=spread, fmt="o", color="C0", capsize=3)
        if row.name == plan.reference:
            axes.axvline(mean, color="gray", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
    axes.set_xlabel(f"{plan.split} perplexity (± sample standard deviation over seeds)")
    axes.grid(axis="x", alpha=0.3)
    with warnings.catch_warnings():
        # The font may lack letters of a variant's name.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=150)


def write_hparams(folder: Path, plan: Plan, trials: Sequence[Trial]) -> None:
    """TensorBoard's HPARAMS page: the keys that variants change and the figures of each trial."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    keys = sorted({key for variant in plan.variants for key in variant.overrides})
    for trial in trials:
        result = trial.result
        if result is None:
            continue
        asked = read_json(trial.path / "trial.json")["asked"]
        plain = {key: asked.get(key) for key in keys}
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in plain.items()
        }
        settings |= {"variant": trial.variant, "seed": trial.seed}
        metrics = {f"ablation/{key}": result[key] for key in FIGURES if result.get(key) is not None}
        with SummaryWriter(str(folder / trial.variant / f"seed-{trial.seed}")) as writer:
            writer.add_hparams(settings, metrics, run_name=".")


def write_outcome(plan: Plan, trials: Sequence[Trial]) -> str:
    """Write ``table.md``, ``table.csv``, ``trials.csv``, ``plot.png`` and ``tensorboard/`` into the
    plan's folder; returns the Markdown."""
    out, rows = Path(plan.out), make_rows(plan, trials)
    table = markdown(plan, rows)
    (out / "table.md").write_text(table, encoding="utf-8")
    write_csv(out / "table.csv", rows)
    write_trials(out / "trials.csv", trials)
    draw(out / "plot.png", plan, rows)
    write_hparams(out / "tensorboard", plan, trials)
    return table
