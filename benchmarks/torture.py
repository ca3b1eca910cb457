"""Kill training runs at random moments, resume each, and compare the outcome bit by bit.

    make torture

Every case runs a small config through ``train.py fit``, sends SIGKILL after a random time, resumes
with ``--ckpt_path last``, kills again, and so on, until the run has finished; then its last
checkpoint is compared with that of a run that was never killed: weights, optimiser, schedule,
loops, random states, and every row's memory.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from memorizing_transformers.training.checkpoint.folder import TRAINER_FILE, candidates, verify
from memorizing_transformers.training.cli import main as train

STEPS = 40


def write_config(path: Path, root: Path) -> None:
    """A run of a few seconds that validates and saves all the time."""
    save = {"every_n_train_steps": 2, "save_top_k": 1}
    config = {
        "trainer": {
            "default_root_dir": str(root),
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}
            ],
        },
        "model": {
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "dropout": 0.1,
            "xl_cache": 32,
            "memory": {"size": 2048, "top_k": 8, "layers": [0, 1], "dtype": "bfloat16"},
        },
        "data": {"batch_rows": 4, "segment_length": 32, "cache_dir": str(root.parent / "cache")},
    }
    path.write_text(yaml.safe_dump(config))


def start(arguments: list[str]) -> int:
    """Run ``train.py`` in a fork, whose imports are done already; returns its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.argv = ["train.py", *arguments]
    code = 1
    try:
        train()
        code = 0
    finally:
        os._exit(code)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested containers with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def content(root: Path) -> dict[str, Any]:
    """All that decides how a run resumes from its newest checkpoint."""
    folder = candidates(root / "version_0" / "checkpoints")[0]
    verify(folder)
    checkpoint = torch.load(folder / TRAINER_FILE, weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")
    found = dict(leaves({key: checkpoint[key] for key in keys}))
    for part in sorted(folder.glob("rank-*.safetensors")):
        found.update({f"{part.name}/{name}": tensor for name, tensor in load_file(part).items()})
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names whose values differ in any bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.numpy(force=True).tobytes() == b.numpy().tobytes()
        return bool(a == b)

    def plain(value: Any) -> Any:
        bf16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        return value.view(torch.int16) if bf16 else value

    names = one.keys() | other.keys()
    return [name for name in names if not same(plain(one.get(name)), plain(other.get(name)))]


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/torture"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)

    def config(name: str) -> Path:
        path = options.folder / f"{name}.yaml"
        write_config(path, options.folder / name)
        return path

    os.waitpid(start(["fit", "--config", str(config("whole"))]), 0)
    began = time.perf_counter()
    os.waitpid(start(["fit", "--config", str(config("again"))]), 0)
    seconds = time.perf_counter() - began
    whole = content(options.folder / "whole")
    assert not differing(whole, content(options.folder / "again")), "runs here differ unkilled"
    print(f"one run: {STEPS} steps, {seconds:.1f} s; {len(whole)} values compared")
    print("| case | kills | of them while saving | differing values |\n|---|---|---|---|")
    kills = case = bad = 0
    while kills < options.kills:
        name = f"case{case}"
        root = options.folder / name
        arguments = ["fit", "--config", str(config(name))]
        here = saving = 0
        while True:
            resume = candidates(root / "version_0" / "checkpoints")
            child = start([*arguments, *(["--ckpt_path", "last"] if resume else [])])
            deadline = time.perf_counter() + draw.uniform(0.1, 0.9) * seconds
            done = 0
            while not done and time.perf_counter() < deadline:
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if done:
                assert status == 0, f"{name}: the run itself failed"
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            here += 1
            saving += any((root / "version_0" / "checkpoints").glob(".*.partial"))
            if not resume and not candidates(root / "version_0" / "checkpoints"):
                shutil.rmtree(root, ignore_errors=True)
        wrong = differing(whole, content(root))
        bad += bool(wrong)
        print(f"| {case} | {here} | {saving} | {len(wrong)} |", flush=True)
        kills += here
        case += 1
        shutil.rmtree(root)
    print(f"\n{kills} kills in {case} runs, seed {options.seed}: {bad} runs differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
