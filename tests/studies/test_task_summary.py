"""Rows of results: means, intervals, paired differences, and how they are shown."""

from __future__ import annotations

import numpy as np
import pytest

from memorizing_studies.tasks.drawing import draw
from memorizing_studies.tasks.items import Item
from memorizing_studies.tasks.outcome import number, table_of
from memorizing_studies.tasks.scoring import Score
from memorizing_studies.tasks.suite import TASKS
from memorizing_studies.tasks.summary import Row, mean_with_interval, summarize

CHOICES = ("a", "b", "c", "d")


def item(x: int, group: str = "", **rivals: float) -> Item:
    return Item(1, x, x, 0.25, group, candidates=CHOICES, rivals=rivals)


def scores(*right: float) -> list[Score]:
    return [Score(one, 2.0 - one, 3, (1 + one) / 2) for one in right]


def find(rows: list[Row], **wanted: object) -> Row:
    (row,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return row


def test_the_summary_of_items() -> None:
    items = [item(256, "4 keys", latest=1.0), item(256, "4 keys"), item(512, "16 keys")]
    rows = summarize("t", items, {"on": scores(1, 1, 0), "off": scores(0, 1, 0)})
    found = find(rows, group="4 keys", x=256, measure="accuracy", arm="on")
    assert (found.value, found.items) == (1.0, 2)
    assert find(rows, group="all", x=None, measure="accuracy", arm="on").value == 2 / 3
    difference = find(rows, group="4 keys", x=256, measure="accuracy", arm="on - off")
    assert difference.value == 0.5
    assert difference.low == 0.0
    assert difference.high == 1.0
    assert find(rows, group="all", x=None, measure="nats", arm="on - off").value == pytest.approx(
        -1 / 3
    )
    assert find(rows, group="4 keys", x=None, measure="accuracy", arm="latest").value == 0.5
    chance = find(rows, group="16 keys", x=512, measure="accuracy", arm="chance")
    assert (chance.value, chance.low) == (0.25, None)
    groups = list(dict.fromkeys(row.group for row in rows))
    assert groups == ["4 keys", "16 keys", "all"]
    assert not [row for row in rows if row.measure == "perplexity"]


def test_parts_have_a_perplexity_and_no_rank() -> None:
    items = [Item(1, 0, 0, 0.0, end=9) for _ in range(3)]
    rows = summarize("t", items, {"on": scores(0, 0.5, 1), "off": scores(0, 0, 0)})
    assert find(rows, x=0, measure="perplexity", arm="on").value == pytest.approx(np.exp(1.5))
    assert {row.measure for row in rows} == {"accuracy", "nats", "perplexity"}
    assert not [row for row in rows if row.arm == "chance"]


def test_intervals_hold_the_mean() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(3.0, 1.0, 400)
    mean, low, high = mean_with_interval(values, False)
    assert low is not None
    assert high is not None
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert mean_with_interval(values, False) == (mean, low, high)
    # Wilson's interval of 9 of 10, from its formula.
    mean, low, high = mean_with_interval(np.array([1.0] * 9 + [0.0]), True)
    assert (mean, low, high) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-4)
    assert mean_with_interval(np.array([2.0]), False) == (2.0, None, None)


def test_a_table_has_a_line_for_each_place() -> None:
    items = [item(256), item(1024), item(1024)]
    rows = summarize("t", items, {"on": scores(1, 1, 0), "off": scores(0, 1, 0)})
    heads, lines = table_of(rows, "accuracy", "tokens back")
    assert heads == ["items", "tokens back", "count", "on", "off", "on - off", "chance"]
    assert [line[:3] for line in lines] == [
        ["all", "256", "1"],
        ["all", "1,024", "2"],
        ["all", "all", "3"],
    ]
    assert lines[0][3].startswith("100.0 [")
    assert number(None) == ""


def test_a_plot_has_a_panel_for_each_group_and_a_line_for_each_arm() -> None:
    items = [item(x, group) for x in (256, 512) for group in ("1 key", "4 keys")]
    rows = summarize("key-values", items, {"on": scores(1, 1, 0, 1), "off": scores(0, 1, 0, 0)})
    figure = draw(TASKS["key-values"], rows)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [panel.get_title() for panel in panels] == ["1 key", "4 keys"]
    for panel in panels:
        assert panel.get_legend_handles_labels()[1] == ["chance", "on", "off"]
