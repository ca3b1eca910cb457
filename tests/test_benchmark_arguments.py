"""Benchmarks refuse at the start what would stop them, or mislead, at the end."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(FOLDER)


@pytest.mark.parametrize(
    ("name", "given", "remedy"),
    [
        ("step", ["--slots", "1024", "8200"], "8200: must be a multiple of 512"),
        ("step", ["--slots", "0"], "0: must be a multiple of 512"),
        ("step", ["--repeats", "65"], "65: must lie between 1 and 64"),
        ("step", ["--repeats", "0"], "0: must lie between 1 and 64"),
        ("step", ["--searches", "exact", "nearest"], "choose from"),
        ("search", ["--searches", "nearest"], "choose from"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(
    name: str,
    given: list[str],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--no_peer", *given, "--out", str(out)])
    if name == "search":
        sys.argv.remove("--no_peer")
    module = importlib.import_module(name)

    def begun(*args: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(module, {"step": "prepare", "search": "load"}[name], begun)
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert given[0] in last
    assert remedy in last
    assert not out.exists()


def test_a_way_whose_process_dies_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loss.py", "--ways", "all", "--device", "nowhere"])
    with pytest.raises(SystemExit, match=r"loss\.py: the process of all ended with code 1"):
        importlib.import_module("loss").main()
