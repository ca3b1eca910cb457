"""What ends a run of several ranks when one is lost: our Liveness, or the libraries alone.

python benchmarks/lost_rank.py

Starts small runs on the CPU (gloo), disturbs one rank at its tenth step and prints a line a run:
the seconds until every process had ended, the exit code, what the terminal said of the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Callback

ENVIRONMENT = "LOST_RANK"
FAULTS = ("kill", "raise", "stop", "hang", "slow")
"""SIGKILL, an exception, SIGSTOP, a main thread that waits for ever, one that works for 40 s."""
STEP = 10
PATIENCE = 90
"""Seconds after which a run is taken to go on for ever."""
START = 300
"""Seconds for a run to reach the step."""
TELLING = re.compile(r"^error: |Error: |Child process|exitcode|^  rank")
"""Lines of the output to print."""
TRAINING = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 40,
    "trainer.limit_val_batches": 0,
    "trainer.num_sanity_val_steps": 0,
    "trainer.log_every_n_steps": 100,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_checkpointing": False,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.memory.size": 32,
    "model.memory.top_k": 4,
    "model.memory.layers": "[-1]",
    "data.batch_rows": 6,
    "data.segment_length": 16,
    "data.num_workers": 1,
}


class Fault(Callback):
    """Disturbs this rank at its tenth step, and notes the moment."""

    def __init__(self, fault: str, rank: int, note: str) -> None:
        self.fault, self.rank, self.note = fault, rank, Path(note)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Note this process; at the step, be killed, raise, stop, hang or be slow."""
        if trainer.global_step == 0:
            (self.note / str(os.getpid())).touch()
        if trainer.global_rank != self.rank or trainer.global_step != STEP:
            return
        (self.note / "when").write_text(str(time.time()))
        if self.fault == "raise":
            raise ArithmeticError("a fault of the trial")
        if self.fault in ("hang", "slow"):
            time.sleep(40 if self.fault == "slow" else 10**6)
        else:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.fault])


def rank_main(fault: str, rank: int, note: str, watch: str) -> None:
    """``train.py`` of one rank, with the fault, with or without our Liveness."""
    from memorizing_transformers.training import cli, trainer

    class Idle(Callback):
        def __init__(self, timeout: float) -> None:
            pass

    class Disturbed(cli.MemoryCLI):
        def before_fit(self) -> None:
            self.trainer.callbacks.append(Fault(fault, rank, note))

    liveness = trainer.Liveness if watch == "ours" else Idle
    with patch.object(trainer, "Liveness", liveness), patch.object(cli, "MemoryCLI", Disturbed):
        cli.main()


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def trial(options: argparse.Namespace, fault: str, rank: int, launch: str, watch: str) -> str:
    """Run once; the line to print."""
    name = f"{watch}-{launch}-{options.ranks}-{fault}-{rank}"
    note = options.folder / name
    note.mkdir(parents=True)
    settings = {**TRAINING, "trainer.devices": options.ranks, "trainer.default_root_dir": note}
    settings |= {
        "data.source": options.folder / "texts",
        "data.cache_dir": options.folder / "cache",
    }
    if watch == "ours":
        settings |= {"trainer.strategy": "ddp", "trainer.rank_timeout": options.timeout}
    else:
        settings["trainer.strategy"] = "lightning.pytorch.strategies.DDPStrategy"
        settings["trainer.strategy.init_args.timeout"] = f"0:00:{options.timeout:02d}"
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
    torchrun += ["--nproc_per_node", str(options.ranks)]
    start = [sys.executable, *(torchrun if launch == "torchrun" else [])]
    job = json.dumps([fault, rank, str(note), watch])
    with (note / "output").open("w") as output:
        run = subprocess.Popen(
            [*start, __file__, "fit", *arguments],
            env={**os.environ, ENVIRONMENT: job, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    code, ended, moment = None, 0.0, note / "when"
    deadline = time.time() + START + PATIENCE
    pids: list[int] = []
    while time.time() < deadline and not ended:
        time.sleep(0.05)
        code = run.poll()
        pids = [int(path.name) for path in note.iterdir() if path.name.isdigit()]
        if moment.exists():
            deadline = min(deadline, float(moment.read_text() or "inf") + PATIENCE)
        if code is not None and not any(map(alive, pids)):
            ended = time.time()
    for pid in {run.pid, *pids}:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    seconds = f"not in {PATIENCE} s" if moment.exists() else "never reached the step"
    if ended and moment.exists():
        seconds = f"{ended - float(moment.read_text()):.0f} s"
    text = (note / "output").read_text()
    told = dict.fromkeys(line.strip()[:160] for line in text.splitlines() if TELLING.search(line))
    cells = (watch, launch, str(options.ranks), fault, str(rank), seconds, str(code))
    return "\t".join((*cells, " // ".join(told)))


def main() -> None:
    """Run the trials asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--victims", nargs="+", type=int, default=[1, 0])
    parser.add_argument("--launches", nargs="+", default=["lightning", "torchrun"])
    parser.add_argument("--watches", nargs="+", default=["libraries", "ours"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=20, help="seconds; the strategy's, or ours")
    parser.add_argument("--folder", type=Path, default=Path("runs/lost_rank"))
    options = parser.parse_args()

    texts = options.folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for index in range(20):
        words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(6)]
        (texts / f"story{index:02d}.txt").write_text(" ".join(draw.choices(words, k=400)))
    for watch in options.watches:
        for launch in options.launches:
            for fault in options.faults:
                for rank in options.victims:
                    print(trial(options, fault, rank, launch, watch), flush=True)


if __name__ == "__main__":
    if ENVIRONMENT in os.environ:
        rank_main(*json.loads(os.environ[ENVIRONMENT]))
    else:
        main()
