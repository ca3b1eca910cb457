"""A small base config for plans."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in ("training", "model"):
    sys.path.append(str(Path(__file__).parent.parent / folder))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two layers of width 16 on fourteen short documents, its text tokenised."""
    from small import write_config, write_texts

    folder = tmp_path_factory.mktemp("base")
    texts = write_texts(folder / "texts")
    return write_config(folder / "config.yaml", texts, folder / "runs")
