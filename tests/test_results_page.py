"""The tables of the results page say what the raw results say."""

from __future__ import annotations

import csv
import importlib.util
import re
import statistics
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "results_page.py"
SPEC = importlib.util.spec_from_file_location("results_page", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
results_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_page)
PAGE = results_page.PAGE.read_text(encoding="utf-8")
TABLES = sorted((results_page.PAGE.parent / "results" / "ablations").glob("*-table.csv"))


def test_the_page_says_what_the_raw_results_say() -> None:
    assert results_page.refresh(PAGE) == PAGE


def test_a_figure_that_is_wrong_is_found() -> None:
    row = re.compile(r"^(\| `[\w.+-]+` \| )\d+\.\d{3}", re.MULTILINE)
    wrong = row.sub(r"\g<1>0.000", PAGE)
    assert wrong != PAGE
    assert results_page.refresh(wrong) == PAGE


def test_variants_without_a_file_or_a_result_are_refused() -> None:
    table = "| variant | perplexity |\n|---|---|\n| `nobody` | 1.0 |\n"
    with pytest.raises(ValueError, match="nobody"):
        results_page.refresh(table)
    with pytest.raises(KeyError, match="nobody"):
        results_page.refresh("[raw](results/ablations/paper-table.csv)\n\n" + table)


def test_every_table_of_raw_results_is_linked_to() -> None:
    files = sorted((results_page.PAGE.parent / "results" / "ablations").glob("*.csv"))
    assert [file.name for file in files if f"results/ablations/{file.name}" not in PAGE] == []


def records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_tables_are_means_and_sample_deviations_of_the_raw_results(table: Path) -> None:
    raw = records(table.with_name(table.name.replace("-table", "")))
    for row in records(table):
        own = [one for one in raw if one["variant"] == row["variant"] and not one["failure"]]
        assert int(row["seeds"]) == len(own)
        for key in [key for key in raw[0] if f"{key}_std" in row]:
            values = [float(one[key]) for one in own if one[key]]
            mean = [statistics.fmean(values)] if values else []
            spread = [statistics.stdev(values)] if len(values) > 1 else []
            assert ([float(row[key])] if row[key] else []) == pytest.approx(mean)
            found = [float(row[f"{key}_std"])] if row[f"{key}_std"] else []
            assert found == pytest.approx(spread)
        assert bool(row["loss_difference_std"]) <= (len(own) > 1)


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_no_p_value_is_below_what_its_documents_can_give(table: Path) -> None:
    for row in records(table):
        if row["p_value"]:
            assert 2 * 0.5 ** int(row["documents"]) <= float(row["p_value"]) <= 1


def test_the_recipes_table_says_what_the_summary_says() -> None:
    """Every figure of the section, by corpus, arm and size of the memory in the test."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "results.md").read_text("utf-8")
    section = page.split("## A better recipe")[1].split("\n## ")[0]
    with (root / "docs" / "results" / "summary.csv").open() as file:
        known = {
            (
                row["corpus"],
                row["arm"] + ("" if row["steps"] == "500" else ", 4,000 steps"),
                int(row["test_memory"]),
                int(row["seed"]),
            ): float(row["perplexity"])
            for row in csv.DictReader(file)
        }
    corpora = ("stdlib", "latex", "books", "web", "code", "isabelle")
    compared = 0
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        seed = 0
        if cells[0] in {arm for _, arm, _, _ in known}:
            size = 0 if cells[0].startswith(("control", "suffix")) else 8192
            seed = int(cells[1]) if cells[1].isdigit() else 0
            own = corpora[:3] if cells[0].endswith("steps") else corpora
            found = [(one, cells[0], size, x) for one, x in zip(own, cells[2:], strict=True)]
        elif cells[0] in ("standard library", "LaTeX"):
            corpus = corpora[cells[0] == "LaTeX"]
            sizes = (2048, 8192, 32768, 131072)
            found = [(corpus, "best", x, cell) for x, cell in zip(sizes, cells[1:], strict=True)]
        else:
            continue
        for corpus, arm, size, cell in found:
            if cell:
                assert cell == f"{known[corpus, arm, size, seed]:.3f}", (corpus, arm, size)
                compared += 1
    assert compared > 90


@pytest.mark.parametrize(
    ("suffix", "plan"), [("-2nd-base", "recipe"), ("-better-base", "better-base")]
)
def test_the_summary_says_what_the_raw_results_of_its_bases_say(suffix: str, plan: str) -> None:
    names = {"control": "no-memory"}
    folder = results_page.PAGE.parent / "results"
    compared = 0
    for row in records(folder / "summary.csv"):
        if not row["arm"].endswith(suffix) or row["test_memory"] not in ("0", "8192"):
            continue
        arm = row["arm"].removesuffix(suffix)
        raw = records(folder / "ablations" / f"{plan}-{row['corpus']}.csv")
        (own,) = [one for one in raw if one["variant"] == names.get(arm, arm)]
        for key in ("perplexity", "bits_per_byte"):
            assert float(row[key]) == pytest.approx(float(own[key]), abs=2e-5)
        assert row["seed"] == own["seed"]
        compared += 1
    assert compared > 5
