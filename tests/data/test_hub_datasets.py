"""Datasets of the hub, by a stand-in: splits, names of revisions, mistakes."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources.splits import fingerprint_sources, open_sources
from memorizing_transformers.errors import ConfigError

RECORDS = [{"title": f"book {n}", "text": f"text of book {n}\n" * 3} for n in range(5)]


def split_names(settings: SourceSettings) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for reading in open_sources(settings):
        for document in reading.source.documents(lambda name: True):
            splits.setdefault(reading.split_of(document.name), []).append(document.name)
    return splits


def fingerprint(settings: SourceSettings) -> str:
    return fingerprint_sources(open_sources(settings))


@pytest.fixture
def hub(monkeypatch) -> dict:
    """A stand-in for the hub: a dictionary of splits, and the calls made."""
    stand_in: dict = {"splits": {}, "calls": [], "hash": "abc"}

    class Builder:
        hash = property(lambda self: stand_in["hash"])

    def load_dataset(path, config=None, **options):
        stand_in["calls"].append((path, config, options))
        return {
            name: datasets.Dataset.from_list(records).to_iterable_dataset()
            for name, records in stand_in["splits"].items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: Builder())
    return stand_in


def test_a_hub_dataset_is_streamed_with_its_own_splits(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS[:3], "dev": RECORDS[3:4], "test": RECORDS[4:]}
    splits = split_names(SourceSettings("hub:owner/books:english@v2"))
    assert splits == {
        "train": ["book 0", "book 1", "book 2"],
        "validation": ["book 3"],
        "test": ["book 4"],
    }
    assert hub["calls"] == [("owner/books", "english", {"revision": "v2", "streaming": True})]


def test_a_hub_dataset_without_splits_is_cut(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS, "validation": RECORDS[:1]}
    splits = split_names(SourceSettings("hub:owner/books"))
    assert splits["validation"] == ["book 0"]
    assert len(splits["test"]) >= 1
    assert sorted(splits["test"] + splits["train"]) == [r["title"] for r in RECORDS]


def test_a_hub_dataset_may_be_the_validation_source(hub: dict, texts: Path) -> None:
    hub["splits"] = {"train": RECORDS, "validation": RECORDS[:2]}
    settings = SourceSettings(str(texts), validation_source="hub:owner/books")
    assert split_names(settings)["validation"] == ["book 0", "book 1"]


def test_a_hub_datasets_fingerprint_follows_its_revision(hub: dict) -> None:
    hub["splits"] = {"train": RECORDS}
    first = fingerprint(SourceSettings("hub:owner/books"))
    assert first == fingerprint(SourceSettings("hub:owner/books"))
    assert first != fingerprint(SourceSettings("hub:owner/books:english"))
    hub["hash"] = "def"
    assert first != fingerprint(SourceSettings("hub:owner/books"))


def test_records_of_the_hub_are_filtered_and_grouped_in_each_split(hub: dict) -> None:
    def records(*numbers: int) -> list[dict]:
        return [{"repo": f"r{n // 4}", "path": -n, "n": n % 2, "text": f"{n}\n"} for n in numbers]

    hub["splits"] = {"train": records(*range(12)), "test": records(20, 22, 21)}
    settings = SourceSettings(
        "hub:owner/code",
        group_column="repo",
        sort_column="path",
        where={"n": 0},
        validation_fraction=0,
    )
    texts = {
        reading.splits[0]: [d.text for d in reading.source.documents(lambda name: True)]
        for reading in open_sources(settings)
    }
    assert texts == {"train": ["2\n0\n", "6\n4\n", "10\n8\n"], "test": ["22\n20\n"]}


def test_hub_mistakes_are_told_in_one_line(hub: dict, monkeypatch) -> None:
    hub["splits"] = {"dev": RECORDS}
    with pytest.raises(ConfigError, match="has no split for train, only dev"):
        open_sources(SourceSettings("hub:owner/books"))
    with pytest.raises(ConfigError, match="names no dataset"):
        open_sources(SourceSettings("hub:"))

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ConfigError, match="ConnectionError: Couldn't reach the Hub") as caught:
        open_sources(SourceSettings("hub:owner/books"))
    assert "\n" not in str(caught.value)
