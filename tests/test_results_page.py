"""The tables of the results page say what the raw results say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "results_page.py"
SPEC = importlib.util.spec_from_file_location("results_page", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
results_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_page)
PAGE = results_page.PAGE.read_text(encoding="utf-8")


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
