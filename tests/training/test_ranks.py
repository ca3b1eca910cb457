"""Two ranks do what one does, each with the memory of its own rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import command, scalars, write_config
from torch import Tensor

ROOT = Path(__file__).parents[2]
STEPS = ["--final_report", "false", "--trainer.max_steps", "16", "--trainer.log_every_n_steps", "1"]


def on_two_ranks(*args: Any) -> None:
    """Run ``train.py`` with two processes that talk through gloo."""
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, args), *ranks],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The config, a run of 16 steps on one rank, and the same on two."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_config(folder / "config.yaml", texts, folder / "one")
    content = yaml.safe_load(config.read_text())
    keep = {"every_n_train_steps": 8, "save_top_k": -1, "filename": "{step}"}
    content["trainer"]["callbacks"][0]["init_args"] = keep
    config.write_text(yaml.safe_dump(content))
    code, _, errors = command("fit", "--config", config, *STEPS)
    assert code == 0, errors
    on_two_ranks("fit", "--config", config, *STEPS, "--trainer.default_root_dir", folder / "two")
    return config, folder / "one" / "version_0", folder / "two" / "version_0"


def memory_of(checkpoint: Path) -> list[dict[str, Tensor]]:
    """By rank, the tensors of its part that belong to rows."""
    parts = sorted(checkpoint.glob("rank-*.safetensors"))
    return [{k: v for k, v in load_file(p).items() if k.startswith("rows.")} for p in parts]


def test_losses_and_validation_agree_with_one_rank(runs: tuple[Path, Path, Path]) -> None:
    """To 1e-3: gradients are summed in another order, and the optimiser amplifies the rounding."""
    one, two = scalars(runs[1]), scalars(runs[2])
    for name in ("train/loss", "val/loss", "val/perplexity", "val/accuracy"):
        assert one[name].keys() == two[name].keys()
        for step, value in one[name].items():
            assert two[name][step] == pytest.approx(value, rel=1e-3), (name, step)


def test_each_rank_keeps_the_memory_of_its_own_rows(runs: tuple[Path, Path, Path]) -> None:
    (whole,) = memory_of(runs[1] / "checkpoints" / "step=16.ckpt")
    first, second = memory_of(runs[2] / "checkpoints" / "step=16.ckpt")
    tokens = "rows.memory.1.token_ids"
    assert torch.equal(torch.cat([first[tokens], second[tokens]]), whole[tokens])
    assert not torch.equal(first[tokens], second[tokens])
    keys = "rows.memory.1.keys"
    both = torch.cat([first[keys], second[keys]])
    assert torch.allclose(both, whole[keys], atol=1e-2)
    assert not torch.allclose(first[keys], second[keys], atol=1e-2)


def test_rows_find_their_rank_when_the_number_of_ranks_changes(
    runs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Two ranks, then one: the losses are those of one unbroken run."""
    config, one, two = runs
    middle = two / "checkpoints" / "step=8.ckpt"
    code, _, errors = command(
        *("fit", "--config", config, *STEPS, "--ckpt_path", middle),
        *("--trainer.default_root_dir", tmp_path / "one"),
    )
    assert code == 0, errors
    resumed = scalars(tmp_path / "one" / "version_0")["train/loss"]
    unbroken = scalars(one)["train/loss"]
    assert resumed
    for step, value in resumed.items():
        assert value == pytest.approx(unbroken[step], rel=1e-3)
