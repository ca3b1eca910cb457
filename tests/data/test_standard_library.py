"""The embedded corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources.documents import Document, Origin
from memorizing_transformers.data.sources.splits import open_sources
from memorizing_transformers.data.sources.standard_library import TEST, VALIDATION, standard_library
from memorizing_transformers.errors import ConfigError


def test_the_standard_library_is_split_by_package() -> None:
    (reading,) = open_sources(SourceSettings())
    sizes: dict[str, dict[str, int]] = {}
    for document in reading.source.documents(lambda name: True):
        sizes.setdefault(reading.split_of(document.name), {})[document.name] = len(document.text)
    assert set(sizes["validation"]) == set(VALIDATION)
    assert set(sizes["test"]) == set(TEST)
    total = sum(sum(split.values()) for split in sizes.values())
    for split in ("validation", "test"):
        assert 0.03 < sum(sizes[split].values()) / total < 0.08
        assert max(sizes[split].values()) > 100_000
    assert len(sizes["train"]) > 100
    assert {"site-packages", "test", "__pycache__"}.isdisjoint(sizes["train"])


def test_the_standard_librarys_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    for name in (
        "argparse.py",
        "json/__init__.py",
        "json/tool.py",
        "json/tests/test_json.py",
        "test/test_json.py",
        "site-packages/numpy/__init__.py",
        "lib-dynload/math.so",
        "_sysconfigdata_linux.py",
        "sitecustomize.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    source = standard_library(Origin("data.source", "stdlib"), tmp_path)
    assert list(source.documents(lambda name: True)) == [
        Document("argparse", "argparse.py\n"),
        Document("json", "json/__init__.py\njson/tool.py\n"),
    ]
    with pytest.raises(ConfigError, match="no Python source"):
        standard_library(Origin("data.source", "stdlib"), tmp_path / "nowhere")
