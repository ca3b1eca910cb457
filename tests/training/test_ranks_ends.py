"""Runs on several ranks end together: at their bounds, and at a signal to any of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import write_config

from memorizing_transformers.training.checkpoint import folder as checkpoints

ROOT = Path(__file__).parents[2]


def ranks_run(config: Path, ranks: int, root: Path, *args: Any) -> subprocess.CompletedProcess[str]:
    """A run on several ranks."""
    given = ["--trainer.devices", ranks, "--trainer.strategy", "ddp", "--final_report", "false"]
    given += ["--trainer.default_root_dir", root, *args]
    line = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config)]
    return subprocess.run(
        [*line, *map(str, given)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


TWO = [{"save_last": True}, {"save_last": True, "monitor": "val/loss"}]


@pytest.mark.parametrize(
    ("ranks", "callbacks", "arguments"),
    [
        (2, None, ["--trainer.max_steps", 2, "--trainer.limit_val_batches", 0]),
        pytest.param(
            3,
            TWO,
            ["--trainer.max_steps", 2, "--trainer.limit_val_batches", 0, "--data.batch_rows", 3],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            TWO,
            [
                *("--trainer.max_epochs", 1, "--trainer.max_steps", -1),
                *("--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 0),
                *("--model.optimizer.total_steps", 9),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            [{"save_last": "link", "monitor": "val/loss"}],
            ["--trainer.max_steps", 9, "--data.batch_rows", 3],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_on_several_ranks_ends_and_is_saved_once(
    texts: Path, tmp_path: Path, ranks: int, callbacks: Any, arguments: list[Any]
) -> None:
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    content = yaml.safe_load(config.read_text())
    if callbacks is not None:
        kind = content["trainer"]["callbacks"][0]["class_path"]
        entries = [{"class_path": kind, "init_args": options} for options in callbacks]
        content["trainer"]["callbacks"] = entries
        config.write_text(yaml.safe_dump(content))
    done = ranks_run(config, ranks, tmp_path / "runs", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "runs").glob("version_*")
    found = checkpoints.candidates(folder)
    manifests = [checkpoints.verify(path) for path in found]
    assert all(manifest["world_size"] == ranks for manifest in manifests)
    last = max(manifest["step"] for manifest in manifests)
    assert f"step {last}" in done.stdout
    assert not [path for path in folder.rglob(".*")]
    assert done.stdout.count("training ended") == 1


def test_a_signal_to_any_rank_ends_all_behind_the_same_step(texts: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    given = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000"]
    line = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *given]
    with (tmp_path / "errors").open("w") as errors:
        run = subprocess.Popen(
            line,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not (last / "manifest.json").exists():
            assert time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.1)
        (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        assert run.wait(60) == 143
    finally:
        run.kill()
        run.wait()
    said = (tmp_path / "errors").read_text()
    told = re.findall(r"^stopped by SIGTERM at step (\d+), saved as (.+);", said, re.MULTILINE)
    assert told == [(str(checkpoints.verify(last)["step"]), str(last))], said
    assert checkpoints.verify(last)["world_size"] == 2
    assert "Traceback" not in said
