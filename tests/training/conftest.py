"""A small corpus, one run of the command line on it, and quiet trainers."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import Run, write_config, write_texts

from memorizing_transformers.training.cli import MemoryCLI


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of fourteen documents of 150 to 700 bytes."""
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One training run from the command line: 24 steps with validation, a checkpoint, a report."""
    root = tmp_path_factory.mktemp("run")
    config = write_config(root / "config.yaml", texts, root / "runs")
    torch.set_num_threads(1)
    output = io.StringIO()
    with (
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
    ):
        warnings.simplefilter("ignore")
        patch.setattr("sys.argv", ["train.py"])
        cli = MemoryCLI(args=["fit", "--config", str(config)])
    return Run(config, root / "runs", root / "runs" / "version_0", cli, output.getvalue())


@pytest.fixture
def config(texts: Path, tmp_path: Path) -> Path:
    """A config whose runs go to ``tmp_path / "runs"``."""
    return write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")


@pytest.fixture
def checkpoint(run: Run, tmp_path: Path) -> Path:
    """A copy of a finished run's checkpoint."""
    copy = tmp_path / "step=24.ckpt"
    shutil.copytree(run.checkpoint, copy)
    return copy
