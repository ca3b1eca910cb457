"""Tables, CSV and plot of a plan, from results that the tests write."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from plans import rows

from memorizing_studies.ablation.json_files import write_json
from memorizing_studies.ablation.plan import Budget, Plan, Variant
from memorizing_studies.ablation.table import FIGURES, make_rows, write_outcome
from memorizing_studies.ablation.trial import Trial
from memorizing_transformers.errors import UserError

Figures = Mapping[str, Sequence[float | None]]
Finish = Callable[[Mapping[str, Figures]], tuple[Plan, list[Trial]]]


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """A plan whose trials have ended, with figures by variant and seed."""

    def finish(figures: Mapping[str, Figures]) -> tuple[Plan, list[Trial]]:
        seeds = tuple(range(max(len(v) for f in figures.values() for v in f.values())))
        variants = tuple(Variant(name) for name in figures)
        plan = Plan("", variants, Budget(tokens=1), seeds=seeds, out=str(tmp_path / "out"))
        trials = []
        for name, of_variant in figures.items():
            for seed in seeds:
                folder = tmp_path / "out" / name / f"seed-{seed}"
                trial = Trial(name, seed, str(folder), "", {}, {}, True, None, "test")
                trial.save({})
                found = {k: v[seed] for k, v in of_variant.items() if len(v) > seed}
                if found:
                    loss = 10 * (found.get("loss") or 0.0)
                    write_json(folder / "documents.json", {"a": [4, loss, 1], "b": [6, 0.0, 2]})
                    write_json(folder / "result.json", found)
                else:
                    trial.fail("it was struck")
                trials.append(trial)
        return plan, trials

    return finish


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved after this call."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def bars(figure: Figure) -> list[float | None]:
    """Half the width of each point's error bar, top to bottom; None without an error bar."""
    found: list[float | None] = []
    for container in figure.axes[0].containers:
        assert isinstance(container, ErrorbarContainer)
        lines = [line for lines in container.lines[2] for line in lines.get_segments()]
        found.append(float(np.ptp(lines[0][:, 0])) / 2 if len(lines) else None)
    return found


def cells(table: str, name: str) -> dict[str, str]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    row = next(one for one in split if one[0] == name)
    return dict(zip(split[0], row, strict=True))


def test_spreads_are_sample_standard_deviations_wherever_they_are_shown(
    finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn(monkeypatch)
    spread = math.sqrt(7 / 3)
    one = {key: [1.0, 2.0, 4.0] for key in FIGURES}
    plan, trials = finish({"base": {key: [0.0] * 3 for key in FIGURES}, "x": one})
    row = make_rows(plan, trials)[1]
    assert row.mean == pytest.approx(dict.fromkeys(FIGURES, 7 / 3))
    assert row.spread == pytest.approx(dict.fromkeys(FIGURES, spread))
    # The base has no spread, so the difference has the spread of the variant.
    assert row.difference is not None
    assert row.difference.spread == pytest.approx(spread)
    table = write_outcome(plan, trials)
    found = rows(Path(plan.out, "table.csv"))["x"]
    for key in FIGURES:
        assert float(found[key]) == pytest.approx(7 / 3)
        assert float(found[f"{key}_std"]) == pytest.approx(spread)
    assert float(found["loss_difference_std"]) == pytest.approx(spread)
    shown = cells(table, "x")
    assert shown["perplexity"] == f"{7 / 3:.3f} ± {spread:.3f}"
    assert shown["accuracy %"] == f"{700 / 3:.2f} ± {100 * spread:.2f}"
    assert shown["Δ loss (p)"].startswith(f"{7 / 3:+.4f} ± {spread:.4f} (")
    assert bars(figures[-1]) == pytest.approx([0, spread])


def test_one_seed_has_no_spread(finish: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    two = {key: [1.0, 3.0] for key in ("perplexity", "loss")}
    one = {key: [2.0] for key in ("perplexity", "loss")}
    plan, trials = finish({"base": two, "half": one, "never": {}})
    table = write_outcome(plan, trials)
    found = rows(Path(plan.out, "table.csv"))
    assert [found[name]["seeds"] for name in found] == ["2", "1", "0"]
    for key in (*(f"{figure}_std" for figure in FIGURES), "loss_difference_std"):
        assert found["half"][key] == found["never"][key] == ""
    assert "±" not in "".join(cells(table, "half").values())
    # Only over the seed that both have.
    assert float(found["half"]["loss_difference"]) == pytest.approx(1)
    assert cells(table, "never") == {
        **dict.fromkeys(cells(table, "never"), ""), "variant": "never", "run": "failed"
    }  # fmt: skip
    assert found["half"]["failures"] == "seed 1: it was struck"
    assert bars(figures[-1]) == [pytest.approx(math.sqrt(2)), None]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_mean_over_fewer_seeds_says_so(finish: Finish, finished: int) -> None:
    whole = {key: [1.0, 2.0, 4.0] for key in FIGURES}
    some = {key: values[:finished] for key, values in whole.items()}
    # A figure may be missing where the run has finished.
    some["recall"] = [0.5, *[None] * (finished - 1)]
    plan, trials = finish({"base": whole, "some": some})
    table = write_outcome(plan, trials)
    assert "seeds)" not in "".join(cells(table, "base").values())
    marked = {head: cell for head, cell in cells(table, "some").items() if "seeds)" in cell}
    figures = {*cells(table, "some")} - {"variant", "run", "recall"}
    assert cells(table, "some")["recall"] == "0.500 (1 of 3 seeds)"
    marked.pop("recall")
    assert {*marked} == (figures if finished < 3 else set())
    assert all(f"({finished} of 3 seeds)" in cell for cell in marked.values())


def test_the_table_is_written_with_figures_that_are_not_finite(finish: Finish) -> None:
    """A finite loss above 709 has no finite perplexity."""
    plan, trials = finish(
        {
            "base": {"loss": [800.0, 801.0], "perplexity": [math.inf, 7.0]},
            "x": {"loss": [1.0, 2.0], "perplexity": [3.0, math.nan]},
        }
    )
    table = write_outcome(plan, trials)
    assert cells(table, "base")["perplexity"] == "inf"
    assert cells(table, "x")["perplexity"] == "nan"
    assert float(cells(table, "x")["Δ loss (p)"].split()[0]) == pytest.approx(-799)
    assert rows(Path(plan.out, "table.csv"))["base"]["perplexity_std"] == ""


def test_multiples_are_relative_to_the_reference(finish: Finish) -> None:
    keys = ("train_step_ms", "train_tokens_per_second", "eval_tokens_per_second", "eval_step_ms")
    plan, trials = finish(
        {"base": {key: [2.0, 4.0] for key in keys}, "x": {key: [12.0] for key in keys}, "no": {}}
    )
    table = write_outcome(plan, trials)
    found = rows(Path(plan.out, "table.csv"))
    assert [float(found["x"][f"{key}_relative"]) for key in keys] == [4] * 4
    assert [found["no"][f"{key}_relative"] for key in keys] == [""] * 4
    assert cells(table, "x")["step ms"] == "12.0 (1 of 2 seeds) (4.00 x)"


def test_raw_results_are_those_of_every_trial(finish: Finish) -> None:
    plan, trials = finish({"base": {"loss": [1.5, 2.5], "train_steps": [3, 4]}, "x": {}})
    write_outcome(plan, trials)
    with Path(plan.out, "trials.csv").open(encoding="utf-8") as file:
        found = [(r["variant"], r["seed"], r["loss"], r["failure"]) for r in csv.DictReader(file)]
    struck = "it was struck"
    assert found == [
        ("base", "0", "1.5", ""), ("base", "1", "2.5", ""), ("x", "0", "", struck),
        ("x", "1", "", struck),
    ]  # fmt: skip


def test_the_table_says_what_it_compares(finish: Finish) -> None:
    plan, trials = finish({"base": {"loss": [1.0]}, "x": {"loss": [2.0]}})
    table = write_outcome(plan, trials)
    assert re.search(r"against base\b.*over 2 documents", table)
    # With a single document that differs, both signs are equally likely.
    assert cells(table, "x")["Δ loss (p)"].endswith("(1)")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"3"])
@pytest.mark.parametrize("name", ["result.json", "documents.json"])
def test_damaged_results_are_named(name: str, content: bytes, finish: Finish) -> None:
    plan, trials = finish({"base": {"loss": [1.0]}, "x": {"loss": [2.0]}})
    (trials[1].path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"x/seed-0/{name} is damaged"):
        write_outcome(plan, trials)


def test_a_result_without_its_documents_is_not_compared(finish: Finish) -> None:
    plan, trials = finish({"base": {"loss": [1.0]}, "x": {"loss": [2.0]}})
    (trials[1].path / "documents.json").unlink()
    assert make_rows(plan, trials)[1].difference is None


def test_names_in_any_script_are_drawn_without_a_warning(finish: Finish) -> None:
    plan, trials = finish({"base": {"perplexity": [1.0]}, "\u8a9e\u5f59": {"perplexity": [2.0]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "\u8a9e\u5f59" in write_outcome(plan, trials)
