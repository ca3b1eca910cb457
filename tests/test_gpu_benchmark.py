"""``benchmarks/gpu.py``, rehearsed with tiny sizes on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

MARK = "gpu"
COMMAND = [sys.executable, str(Path(__file__).parent.parent / "benchmarks" / "gpu.py")]


def parts_and_sizes() -> tuple[Any, Any]:
    """The module of the parts, and the sizes of a rehearsal."""
    return importlib.import_module("gpu_parts"), importlib.import_module("gpu_rows").TINY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "gpu.py: no CUDA device here; --rehearse runs tiny sizes on the CPU\n"
    assert not (tmp_path / "out").exists()


def test_parts_that_had_no_time_are_named(tmp_path: Path) -> None:
    command = [*COMMAND, "--rehearse", "--minutes", "0", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    facts = json.loads((tmp_path / "gpu.json").read_text())
    parts = [row["part"] for row in facts["not begun"]]
    assert parts == ["parity", "tests", "steps", "searches", "profile"]
    assert "not begun" in (tmp_path / "gpu.md").read_text()


def test_rows_without_a_time_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    plot = importlib.import_module("gpu").plot
    row = {"search": "exact", "dtype": "float32", "slots": 64, "ms": 1.0}
    cut = {**dict.fromkeys(row), "slots": "no time left"}
    full = {"slots": 8, "optimizer": "adamw", "compiled": False, "place": "cpu", "ms": None}
    plot({"searches": [row, cut], "steps": [full]}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").is_file()


def test_tests_of_the_gpu_run_where_others_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine with the GPU may have torch and little else."""
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    gpu = importlib.import_module("gpu")
    needs_more = "import a_package_that_is_not_here\n"
    own = f"import pytest\n@pytest.mark.{MARK}\ndef test_it():\n    pass\n"
    folder = tmp_path / "tests" / "deep"
    folder.mkdir(parents=True)
    (folder / "test_kernel.py").write_text(own)
    (folder / "test_both.py").write_text(needs_more + own)
    (folder / "test_other.py").write_text(needs_more + "def test_other():\n    pass\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    total, *failures = [row["tests"] for row in gpu.run_tests(60)]
    assert "1 passed" in total
    assert "1 error" in total
    assert len(failures) == 1
    assert "test_both.py" in failures[0]


def test_a_step_that_does_not_fit_is_gone_before_the_next_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next one has not the room either, or its peak counts both."""
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    parts, tiny = parts_and_sizes()
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Step(parts.Step):  # type: ignore[misc]
        def __init__(self, *given: Any, **chosen: Any) -> None:
            super().__init__(*given, **{**chosen, "compiled": False})
            alive.append(sum(ref() is not None for ref in made))
            made.append(weakref.ref(self))
            self.slots = chosen["slots"]

        def __call__(self) -> None:
            if self.slots == tiny.slots[-1]:
                raise torch.OutOfMemoryError
            super().__call__()

    monkeypatch.setattr(parts, "Step", Step)
    rows = list(parts.steps(replace(tiny, seconds=0.0), torch.device("cpu")))
    full = tiny.slots[-1]
    assert all((row["peak GiB"] == "does not fit") == (row["slots"] == full) for row in rows)
    assert alive == [0] * len(rows)


@pytest.mark.parametrize("part", ["steps", "searches"])
def test_one_that_fails_is_a_row_and_the_others_go_on(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    parts, tiny = parts_and_sizes()
    calls: list[int] = []

    def timed(*_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise TypeError("compile() got an unexpected keyword\nand more")
        return [1.0]

    monkeypatch.setattr(parts, "timed", timed)
    rows = list(getattr(parts, part)(tiny, torch.device("cpu")))
    assert len(rows) == len(calls) == {"steps": 9, "searches": 12}[part]
    assert len({tuple(row) for row in rows}) == 1
    assert [row["ms"] is None for row in rows] == [False, True, *[False] * (len(rows) - 2)]
    said = "failed: compile() got an unexpected keyword"
    assert rows[1]["peak GiB" if part == "steps" else "recall"] == said


def test_without_its_first_variant_a_kind_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    parts, tiny = parts_and_sizes()

    def measured(_: Any, __: Any, variant: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        if variant == {"slots": 0}:
            raise torch.OutOfMemoryError
        return 1.0, {}

    monkeypatch.setattr(parts, "measured_step", measured)
    rows = list(parts.steps(tiny, torch.device("cpu")))
    ratios = {(row["optimizer"], row["compiled"]): row["of no memory"] for row in rows}
    assert ratios == {("adamw", False): None, ("adafactor", False): 1.0, ("adamw", True): 1.0}


def test_rows_say_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback must not be taken for what it replaces."""
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    parts, tiny = parts_and_sizes()
    from memorizing_transformers.memory.search import bucketed
    from memorizing_transformers.memory.search.policy import KERNELS, KernelChoice, KernelFailed

    def fail(*_: Any) -> Any:
        raise KernelFailed("no room for it")

    chosen = KernelChoice("triton", 8, "for the test")
    monkeypatch.setattr(bucketed, "choose_kernel", lambda *_: chosen)
    monkeypatch.setitem(KERNELS, "triton", KERNELS["torch"]._replace(run=fail))
    monkeypatch.setattr(parts, "flex_failure", lambda *_: "no compiler")
    shape = replace(tiny, segment=128, slots=(128, 256), seconds=0.0)
    device = torch.device("cpu")
    real = parts.Step
    monkeypatch.setattr(parts, "Step", lambda *given, **key: real(*given, **{**key, "compiled": 0}))
    fell = "bucketed search continues in plain torch: no room for it"
    for row in parts.steps(shape, device):
        assert row["local attention"] == "not flex: no compiler"
        assert (row["search kernel"], row["warnings"]) == (
            ("torch", fell) if row["slots"] else (None, None)
        )
    for row in parts.searches(shape, device):
        ran = ("torch", fell) if row["search"] == "bucketed" else (None, None)
        assert (row["kernel"], row["warnings"]) == ran
    warnings = [row["warnings"] for row in parts.parity(shape, device)]
    assert warnings == [None, fell, fell]


def test_a_package_that_is_not_installed_stops_no_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(COMMAND[1]).parent))
    measure = importlib.import_module("measure")
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(measure, "version", version)
    found = measure.circumstances()
    assert found["torch"] == real("torch")
    assert found["faiss-cpu"] == found["numpy"] == "not installed"


@pytest.mark.slow  # it compiles, and collects the tests
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [*COMMAND, "--rehearse", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "failed" not in ended.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in facts
    recalls = [row["recall"] for row in facts["searches"]]
    assert len(recalls) == 12
    assert min(recalls) > 0.9
    assert {row["optimizer"] for row in facts["steps"]} == {"adamw", "adafactor"}
    assert all(row["ms"] > 0 for row in facts["steps"])
    assert abs(facts["parity"][-1]["figure"]) < 1e-6
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "aten::" in (tmp_path / "gpu_profile.txt").read_text()
    assert "skipped" in facts["tests"][0]["tests"]
