"""Columns by name and path: what they find, what orders them, and names that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from memorizing_transformers.data.sources.columns import (
    MISSING,
    Column,
    NotText,
    RecordRules,
    sort_key,
)
from memorizing_transformers.errors import ConfigError

FILES = [{"path": "b.py", "content": "two\n"}, {"path": "a.py", "content": "one"}]
NESTED = {"meta": {"set": "arxiv", "deep": {"x": 1}}, "files": FILES, "a.b": "flat"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("meta.set", "arxiv"),
        ("meta.deep.x", 1),
        ("a.b", "flat"),
        ("files[].content", FILES),
        ("meta", NESTED["meta"]),
        ("set", MISSING),
        ("meta.none", MISSING),
        ("meta.set.none", MISSING),
    ],
)
def test_a_column_is_found_by_its_name_or_path(name: str, value: object) -> None:
    assert Column(name).value(NESTED) == value


@pytest.mark.parametrize(
    ("record", "column", "text"),
    [
        ({"text": "x"}, "text", "x"),
        ({"text": None}, "text", None),
        ({}, "text", MISSING),
        ({"meta": {"body": "x"}}, "meta.body", "x"),
        (NESTED, "files[].content", "two\none\n"),
        ({"in": {"files": FILES}}, "in.files[].content", "two\none\n"),
        ({"files": [{"v": {"text": "x"}}]}, "files[].v.text", "x"),
        ({"pages": ["one", "two"]}, "pages[]", "one\ntwo\n"),
        ({"files": []}, "files[].content", ""),
        ({"files": None}, "files[].content", None),
        ({"files": [{"content": None}, {"path": "x"}, {"content": "x"}]}, "files[].content", "x"),
        ({"files": [{"path": "x"}]}, "files[].content", MISSING),
        ({"other": 1}, "files[].content", MISSING),
    ],
)
def test_text_of_a_record(record: dict[str, Any], column: str, text: object) -> None:
    assert RecordRules(column).text_of(record) == text


@pytest.mark.parametrize(
    ("record", "column", "told"),
    [
        ({"text": 5}, "text", "column 'text' holds int, not text"),
        ({"text": ["x"]}, "text", "column 'text' holds list, not text"),
        ({"files": "x"}, "files[].content", "column 'files' holds str, not a list"),
        ({"files": {"content": "x"}}, "files[].content", "column 'files' holds dict, not a list"),
        ({"files": [{"content": 3}]}, "files[].content", "column 'files[].content' holds int"),
    ],
)
def test_what_is_no_text_is_told(record: dict[str, Any], column: str, told: str) -> None:
    with pytest.raises(NotText) as caught:
        RecordRules(column).text_of(record)
    assert told in str(caught.value)


def test_items_of_a_list_are_joined_in_the_order_of_another_column() -> None:
    rules = RecordRules("files[].content", sort_column="files[].path")
    assert rules.text_of(NESTED) == "one\ntwo\n"
    numbered = [{"n": n, "t": f"{n}\n"} for n in (10, 9, 1)]
    assert RecordRules("p[].t", sort_column="p[].n").text_of({"p": numbered}) == "1\n9\n10\n"


def test_any_values_have_an_order() -> None:
    values = [None, "b", 10, "a", 9.5, True, MISSING, float("nan"), 10**400, "ä", -1, "\ud83d"]
    ordered = sorted(values, key=sort_key)
    assert ordered[:3] == [-1, 9.5, 10]
    assert ordered[-2:] == [None, MISSING]
    assert [value for value in ordered if value in ("a", "b", "ä")] == ["a", "b", "ä"]
    assert sorted(values[::-1], key=sort_key)[:3] == ordered[:3]


@pytest.mark.parametrize(
    ("where", "record", "kept"),
    [
        ({}, {}, True),
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "x"}, {"a": "y"}, False),
        ({"a": "x"}, {}, False),
        ({"a": ["x", "y"]}, {"a": "y"}, True),
        ({"a": "x", "b": 1}, {"a": "x", "b": 2}, False),
        ({"a": "x"}, {"a": ["y", "x"]}, True),
        ({"a": "x"}, {"a": []}, False),
        ({"m.set": "x"}, {"m": {"set": "x"}}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": None}, {"b": 1}, True),
        ({"a": False}, {"a": 0}, False),
    ],
)
def test_the_filter_compares_values(where: dict, record: dict, kept: bool) -> None:
    assert RecordRules(where=where).keeps(record) is kept


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"text_column": ""}, "data.text_column = '': names no column"),
        ({"text_column": "[]"}, "data.text_column = '[]': names no column"),
        ({"text_column": "a[]b"}, "data.text_column = 'a[]b': names no column"),
        ({"text_column": "a[].b[].c"}, "data.text_column = 'a[].b[].c': names no column"),
        ({"text_column": "a[]..c"}, "data.text_column = 'a[]..c': names no column"),
        ({"group_column": "a[].b"}, "data.group_column = 'a[].b': names no column"),
        ({"group_column": ""}, "data.group_column = '': names no column"),
        ({"sort_column": "path"}, "data.sort_column = 'path': sorts nothing"),
        ({"sort_column": "a[].b"}, "data.sort_column = 'a[].b': must name the same list as"),
        (
            {"text_column": "b[].c", "sort_column": "a[].b"},
            "must name the same list as data.text_column ('b[].c')",
        ),
        ({"where": {"a[].b": 1}}, "data.where = 'a[].b': names no column"),
        ({"where": {"a": []}}, "give a one value or a list of values"),
        ({"where": {"a": {"b": 1}}}, "give a one value or a list of values"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RecordRules(**rules)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_names_of_plain_columns_are_names() -> None:
    for name in ("a.", ".b", "a..b", "two words"):
        assert RecordRules(name).text_of({name: "x"}) == "x"


def test_facts_by_default_are_those_of_stores_made_before() -> None:
    assert RecordRules("body").facts() == ["body"]
    different = [
        {"group_column": "g"},
        {"group_column": "g", "sort_column": "s"},
        {"group_column": "g", "by_folder": True},
        {"where": {"a": "x"}},
        {"where": {"a": ["x", "y"]}},
        {"where": {"b": "x"}},
    ]
    facts = [repr(RecordRules(**rules).facts()) for rules in ({}, *different)]
    assert len(set(facts)) == len(facts)
    assert (
        RecordRules(where={"a": 1, "b": 2}).facts() == RecordRules(where={"b": 2, "a": 1}).facts()
    )
