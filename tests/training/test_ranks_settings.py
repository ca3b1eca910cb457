"""On two ranks: other settings after a resume, and given weights, do what they do on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import command, scalars
from test_ranks import on_one_rank, on_ranks, write_saving_config
from test_resume_settings import rewrite, without_dimension

STEPS = ["--final_report", "false", "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"]
STEPS += ["--trainer.limit_val_batches", "1"]


@pytest.fixture(scope="module")
def first(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """By memory size the config and checkpoint of a run of three steps on one rank."""
    folder = tmp_path_factory.mktemp("settings")
    found = {}
    for size in (0, 32):
        root = folder / str(size)
        config = write_saving_config(folder / f"{size}.yaml", texts, root, every=3)
        given = [*STEPS, "--trainer.max_steps", "3", "--model.memory.size", size]
        on_one_rank("fit", "--config", config, *given)
        found[size] = (config, root / "version_0" / "checkpoints" / "step=3.ckpt")
    return found


RESUME, START, SLOW = "--ckpt_path", "--model.init_from", pytest.mark.slow


@pytest.mark.parametrize(
    ("key", "sizes", "strategy"),
    [
        pytest.param(RESUME, (0, 32), "ddp", id="memory on"),
        pytest.param(RESUME, (32, 0), "ddp", id="memory off", marks=SLOW),
        pytest.param(RESUME, (0, 32), "sharded", id="memory on, sharded", marks=SLOW),
        pytest.param(RESUME, (32, 0), "sharded", id="memory off, sharded", marks=SLOW),
        pytest.param(START, (0, 32), "ddp", id="weights with memory added", marks=SLOW),
        pytest.param(START, (0, 32), "sharded", id="the same, sharded", marks=SLOW),
    ],
)
def test_two_ranks_take_over_what_one_does(
    sizes: tuple[int, int], strategy: str, key: str, first: dict[int, Any], tmp_path: Path
) -> None:
    config, checkpoint = first[sizes[0]]
    given = ["fit", "--config", config, *STEPS, "--model.memory.size", sizes[1], key, checkpoint]
    given += ["--model.optimizer.lr", "3e-3", "--model.optimizer.weight_decay", "0.2"]
    roots = [tmp_path / "one", tmp_path / "two"]
    on_one_rank(*given, "--trainer.default_root_dir", roots[0])
    on_ranks(2, *given, "--trainer.default_root_dir", roots[1], strategy=strategy)
    one, two = (scalars(root / "version_0") for root in roots)
    assert len(one["train/loss"]) == (3 if key == RESUME else 6)
    for name in ("train/loss", "trainer/learning_rate"):
        assert two[name] == {step: pytest.approx(v, rel=1e-3) for step, v in one[name].items()}
    saved = [root / "version_0" / "checkpoints" / "step=6.ckpt" / "trainer.ckpt" for root in roots]
    states = [torch.load(path, weights_only=True)["optimizer_states"][0] for path in saved]
    assert states[0]["state"].keys() == states[1]["state"].keys() or strategy == "sharded"
    steps = [sorted(float(v["step"]) for v in state["state"].values()) for state in states]
    assert steps[0] == steps[1]


def test_sharded_ranks_go_on_with_a_copy_head_of_an_earlier_version(
    texts: Path, tmp_path: Path
) -> None:
    roots = [tmp_path / name for name in ("first", "one", "two")]
    config = write_saving_config(tmp_path / "config.yaml", texts, roots[0], every=3)
    given = ["fit", "--config", config, *STEPS, "--model.memory.copy", '["neighbours", "repeats"]']
    on_one_rank(*given, "--trainer.max_steps", "3")
    checkpoint = roots[0] / "version_0" / "checkpoints" / "step=3.ckpt"
    rewrite(checkpoint, without_dimension)
    given += ["--ckpt_path", checkpoint]
    on_one_rank(*given, "--trainer.default_root_dir", roots[1])
    on_ranks(2, *given, "--trainer.default_root_dir", roots[2], strategy="sharded")
    one, two = (scalars(root / "version_0")["train/loss"] for root in roots[1:])
    assert two == {step: pytest.approx(loss, rel=1e-3) for step, loss in one.items()}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_what_cannot_update_shards_is_refused_before_any_work(
    name: str, texts: Path, tmp_path: Path
) -> None:
    config = write_saving_config(tmp_path / "config.yaml", texts, tmp_path / "runs", every=4)
    given = ["--config", config, "--trainer.strategy", "sharded"]
    given += ["--model.optimizer.name", name, "--data.cache_dir", tmp_path / "cache"]
    code, _, err = command("fit", *given)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: model.optimizer.name = '{name}': ")
    assert "trainer.strategy=sharded" in line
    assert not (tmp_path / "cache").exists()
