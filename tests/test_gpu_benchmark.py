"""``benchmarks/gpu.py``, rehearsed with tiny sizes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMMAND = [sys.executable, str(Path(__file__).parent.parent / "benchmarks" / "gpu.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "gpu.py: no CUDA device here; --rehearse runs tiny sizes on the CPU\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a minute: it compiles, and collects the tests
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
