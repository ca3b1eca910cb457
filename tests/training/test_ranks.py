"""Two ranks do what one does, each with the memory of its own rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import assert_alike, command, scalars, write_config
from torch import Tensor

ROOT = Path(__file__).parents[2]
STEPS = ["--final_report", "false", "--trainer.max_steps", "16", "--trainer.log_every_n_steps", "1"]


def on_ranks(number: int, *args: Any, strategy: str = "ddp") -> None:
    """Run ``train.py`` with processes that talk through gloo."""
    ranks = ["--trainer.devices", str(number), "--trainer.strategy", strategy]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, args), *ranks],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def on_one_rank(*args: Any) -> None:
    code, _, errors = command(*args)
    assert code == 0, errors


def write_saving_config(path: Path, texts: Path, root: Path, every: int) -> Path:
    """A config that keeps a checkpoint of every so many steps under its step's name."""
    config = write_config(path, texts, root)
    content = yaml.safe_load(config.read_text())
    keep = {"every_n_train_steps": every, "save_top_k": -1, "filename": "{step}"}
    content["trainer"]["callbacks"][0]["init_args"] = keep
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The config, a run of 16 steps on one rank, and the same on two."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_saving_config(folder / "config.yaml", texts, folder / "one", every=4)
    report = ("--final_report", "true")
    on_one_rank("fit", "--config", config, *STEPS, *report)
    root = ("--trainer.default_root_dir", folder / "two")
    on_ranks(2, "fit", "--config", config, *STEPS, *report, *root)
    return config, folder / "one" / "version_0", folder / "two" / "version_0"


def assert_losses_agree(folder: Path, unbroken: Path) -> None:
    """To 1e-3: gradients are summed in another order, and the optimiser amplifies the rounding."""
    ours, theirs = scalars(folder), scalars(unbroken)
    assert ours["train/loss"]
    for name in ("train/loss", "val/loss", "val/perplexity", "val/accuracy"):
        for step, value in ours.get(name, {}).items():
            assert value == pytest.approx(theirs[name][step], rel=1e-3), (name, step)


def memory_of(checkpoint: Path) -> list[dict[str, Tensor]]:
    """By rank, the tensors of its part that belong to rows."""
    parts = sorted(checkpoint.glob("rank-*.safetensors"))
    return [{k: v for k, v in load_file(p).items() if k.startswith("rows.")} for p in parts]


def test_losses_and_validation_agree_with_one_rank(runs: tuple[Path, Path, Path]) -> None:
    assert scalars(runs[1])["val/loss"].keys() == scalars(runs[2])["val/loss"].keys()
    assert scalars(runs[1])["train/loss"].keys() == scalars(runs[2])["train/loss"].keys()
    assert_losses_agree(runs[2], runs[1])


def test_final_report_agrees_with_one_rank(runs: tuple[Path, Path, Path]) -> None:
    one, two = (json.loads((run / "report.json").read_text())["rows"] for run in runs[1:])
    assert [(row["split"], row["memory"]) for row in one] == [
        *(("validation", 32), ("validation", 0), ("test", 32), ("test", 0))
    ]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == {
            key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            for key, value in theirs.items()
        }


def test_the_gain_is_over_the_documents_of_all_ranks(runs: tuple[Path, Path, Path]) -> None:
    one, two = (scalars(run)["memory/gain_bits_per_token"] for run in runs[1:])
    assert two == {step: pytest.approx(gain, abs=1e-4) for step, gain in one.items()}
    assert len([*runs[2].glob("events*")]) == 1  # rank 0's


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


def go_on(run: Path, step: int, ranks: int, config: Path, root: Path) -> Path:
    """Resume from a step's checkpoint on another number of ranks, in a folder of its own."""
    checkpoint = run / "checkpoints" / f"step={step}.ckpt"
    given = ("fit", "--config", config, *STEPS, "--trainer.default_root_dir", root)
    if ranks == 1:
        on_one_rank(*given, "--ckpt_path", checkpoint)
    else:
        on_ranks(ranks, *given, "--ckpt_path", checkpoint)
    return root / "version_0"


def test_rows_find_their_rank_from_two_to_one_to_two(
    runs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The losses are those of one unbroken run."""
    config, one, two = runs
    single = go_on(two, 4, 1, config, tmp_path / "one")
    assert_losses_agree(single, one)
    again = go_on(single, 8, 2, config, tmp_path / "two")
    assert_losses_agree(again, one)
    assert min(scalars(again)["train/loss"]) == 8


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config, _, two = runs
    resumed = go_on(two, 8, 2, config, tmp_path)
    ours, theirs = (run / "checkpoints" / "step=16.ckpt" for run in (resumed, two))
    for one, other in zip(memory_of(ours), memory_of(theirs), strict=True):
        assert_alike(one, other)
    weights = [torch.load(run / "trainer.ckpt", weights_only=True) for run in (ours, theirs)]
    assert_alike(weights[0]["state_dict"], weights[1]["state_dict"])


@pytest.mark.slow
def test_rows_find_their_rank_from_one_to_two_to_four_to_one(
    runs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config, one, _ = runs
    two = go_on(one, 4, 2, config, tmp_path / "two")
    four = go_on(two, 8, 4, config, tmp_path / "four")
    last = go_on(four, 12, 1, config, tmp_path / "last")
    for run in (two, four, last):
        assert_losses_agree(run, one)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_processes_that_others_start_agree_with_one_rank(
    runs: tuple[Path, Path, Path], tmp_path: Path, launcher: str
) -> None:
    """torchrun itself, and the variables that SLURM's srun sets for each task."""
    given = ["fit", "--config", str(runs[0]), *STEPS, "--trainer.devices", "2"]
    given += ["--trainer.strategy", "ddp", "--trainer.default_root_dir", str(tmp_path)]
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        started = [subprocess.Popen([*run, str(ROOT / "train.py"), *given], env=plain)]
    else:
        slurm = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
        slurm |= {"NODEID": "0", "NNODES": "1", "NODELIST": "localhost"}
        started = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *given],
                env={
                    **plain,
                    **{f"SLURM_{key}": value for key, value in slurm.items()},
                    **{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_ADDR": "127.0.0.1"},
                },
            )
            for rank in "01"
        ]
    assert [process.wait(200) for process in started] == [0] * len(started)
    assert_losses_agree(tmp_path / "version_0", runs[1])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config and its run on one rank, on one long document, many short ones, and two unequal
    ones for validation, so that a rank has nothing to read while the other goes on."""
    folder = tmp_path_factory.mktemp("uneven")
    texts, held_out = folder / "texts", folder / "held_out"
    texts.mkdir()
    held_out.mkdir()
    for index in range(12):
        length = 1500 if index == 0 else 20 + 7 * index
        (texts / f"{index}.txt").write_text(
            ("abcdefgh"[index % 8] + "xyz ") * (length // 5), "utf-8"
        )
    (held_out / "long.txt").write_text("some words " * 60, "utf-8")
    (held_out / "short.txt").write_text("few words", "utf-8")
    config = write_saving_config(folder / "config.yaml", texts, folder / "one", every=4)
    content = yaml.safe_load(config.read_text())
    content["data"] |= {"validation_source": str(held_out), "test_source": str(held_out)}
    config.write_text(yaml.safe_dump(content))
    on_one_rank("fit", "--config", config, *STEPS)
    return config, folder / "one" / "version_0"


def test_sharded_ranks_agree_with_one_whatever_their_documents(
    uneven: tuple[Path, Path], tmp_path: Path
) -> None:
    """FSDP2 on two ranks: a forward pass is a collective, so no rank may skip one."""
    config, one = uneven
    root = ("--trainer.default_root_dir", tmp_path / "two")
    on_ranks(2, "fit", "--config", config, *STEPS, *root, strategy="sharded")
    two = tmp_path / "two" / "version_0"
    assert_losses_agree(two, one)
    assert scalars(two)["val/loss"].keys() == scalars(one)["val/loss"].keys()
    saved = [
        torch.load(run / "checkpoints" / "step=8.ckpt" / "trainer.ckpt", weights_only=True)
        for run in (one, two)
    ]
    one_state, two_state = (checkpoint["state_dict"] for checkpoint in saved)
    assert one_state.keys() == two_state.keys()
    for name, tensor in one_state.items():
        # Where a gradient is rounding alone, Adam moves a weight by a whole step either way.
        assert (tensor - two_state[name]).abs().median() < 1e-4, name
    assert_losses_agree(go_on(two, 8, 1, config, tmp_path / "one"), one)


@pytest.mark.slow
def test_sharded_ranks_go_on_from_one_rank_and_from_their_own(
    uneven: tuple[Path, Path], tmp_path: Path
) -> None:
    config, one = uneven
    steps = ("fit", "--config", config, *STEPS)
    roots = [tmp_path / name / "version_0" for name in ("from one", "from two")]
    for source, step, root in ((one, 8, roots[0]), (roots[0], 12, roots[1])):
        checkpoint = source / "checkpoints" / f"step={step}.ckpt"
        places = ("--ckpt_path", checkpoint, "--trainer.default_root_dir", root.parent)
        on_ranks(2, *steps, *places, strategy="sharded")
        assert_losses_agree(root, one)
