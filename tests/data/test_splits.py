"""From settings to sources: which document goes to which split, and the fingerprint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources.documents import Origin
from memorizing_transformers.data.sources.splits import (
    fingerprint_sources,
    open_sources,
    split_by_name,
)
from memorizing_transformers.errors import ConfigError, UserError


def split_names(settings: SourceSettings) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for reading in open_sources(settings):
        for document in reading.source.documents(lambda name: True):
            splits.setdefault(reading.split_of(document.name), []).append(document.name)
    return splits


def test_a_documents_split_is_its_own(texts: Path) -> None:
    shares = {"validation": 0.2, "test": 0.2}
    names = [f"document {n}" for n in range(500)]
    origin = Origin("data.source", "x")
    all_of_them = split_by_name(names, shares, origin)
    half = split_by_name(names[::2], shares, origin)
    splits = [all_of_them(name) for name in names]
    assert splits[::2] == [half(name) for name in names[::2]]
    assert splits.count("validation") == pytest.approx(100, abs=35)
    assert splits.count("test") == pytest.approx(100, abs=35)


@pytest.mark.parametrize("count", range(3, 12))
def test_every_split_gets_a_document(count: int) -> None:
    names = [f"n{n}" for n in range(count)]
    for shares in (
        {"validation": 0.05, "test": 0.05},
        {"validation": 0.49, "test": 0.49},
        {"test": 0.001},
    ):
        splits = [split_by_name(names, shares, Origin("data.source", "x"))(n) for n in names]
        assert set(splits) == {"train", *shares}
        again = split_by_name(reversed(names), shares, Origin("data.source", "x"))
        assert splits == [again(name) for name in names]


@pytest.mark.parametrize("shares", [{"test": 0.001}, {"validation": 0.02, "test": 0.03}], ids=str)
def test_names_are_read_only_until_every_split_has_one(shares: dict[str, float]) -> None:
    """To name the records of a corpus is to read all of it."""
    origin, names = Origin("data.source", "x"), [f"book {n}" for n in range(20_000)]
    rest = iter(names)
    split_of = split_by_name(rest, shares, origin)
    read = len(names) - len([*rest])
    assert read < len(names) / 2
    held_out = {split_of(name) for name in names[:read]}
    assert held_out == {"train", *shares}
    assert {split_of(name) for name in names[: read - 1]} != held_out
    # The same as by all names.
    assert all(split_of(name) == split_by_name(names, shares, origin)(name) for name in names[:50])
    assert sum(split_of(name) != "train" for name in names) == pytest.approx(
        len(names) * sum(shares.values()), rel=0.5
    )


def test_too_few_documents_to_split_are_told(texts: Path) -> None:
    file = texts / "text00.txt"
    with pytest.raises(UserError, match="1 documents, too few to cut off validation and test"):
        open_sources(SourceSettings(str(file)))
    whole = SourceSettings(str(file), validation_fraction=0, test_fraction=0)
    assert split_names(whole) == {"train": ["text00.txt"]}


def test_given_sources_are_not_cut(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("validation")
    settings = SourceSettings(str(texts), validation_source=str(tmp_path / "val.txt"))
    splits = split_names(settings)
    assert splits["validation"] == ["val.txt"]
    assert len(splits["train"]) + len(splits["test"]) == 12
    with pytest.raises(ConfigError, match=r"^data\.test_source = 'nowhere'"):
        open_sources(SourceSettings(str(texts), test_source="nowhere"))


def fingerprint(settings: SourceSettings) -> str:
    return fingerprint_sources(open_sources(settings))


def test_the_fingerprint_follows_content_names_and_rules(texts: Path, tmp_path: Path) -> None:
    seen = {fingerprint(SourceSettings(str(texts)))}
    assert fingerprint(SourceSettings(str(texts))) in seen
    moved = tmp_path / "elsewhere"
    texts.rename(moved)
    (moved / "z").mkdir()
    assert fingerprint(SourceSettings(str(moved))) in seen
    for change in (
        lambda: (moved / "text03.txt").write_text("changed"),
        lambda: (moved / "text04.txt").rename(moved / "text04.md"),
        lambda: (moved / "text05.txt").unlink(),
        lambda: (moved / "text11.txt").rename(moved / "z" / "text11.txt"),
    ):
        change()
        new = fingerprint(SourceSettings(str(moved)))
        assert new not in seen
        seen.add(new)
    for options in ({"test_fraction": 0.2}, {"group": "folder"}, {"validation_source": str(moved)}):
        settings = SourceSettings(str(moved), **options)
        if options != {"group": "folder"}:  # the same documents here, whichever way
            assert fingerprint(settings) not in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group": "repository"},
            "data.group = 'repository': must be 'file', 'folder' or",
        ),
        ({"test_fraction": 1.0}, "data.test_fraction = 1.0: must be at least 0 and below 1"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "data.test_fraction = 0.4: leaves"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SourceSettings(**options)
    assert str(caught.value).startswith(message)


def test_reading_text_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, memorizing_transformers.data.tokens.prepare; "
        "sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
