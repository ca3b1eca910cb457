"""What a checkpoint of a large memory costs: the copy that training waits for, and the writing.

python benchmarks/saving.py
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from pathlib import Path

import torch

from memorizing_transformers.memory import STORAGE_DTYPES, Memory, MemoryBank
from memorizing_transformers.training.checkpoint import folder as checkpoints
from memorizing_transformers.training.checkpoint.rank_state import RankPart


def main() -> None:
    """Save one rank's rows and print a line a repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--slots", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=list(STORAGE_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/saving"))
    options = parser.parse_args()

    dtype = STORAGE_DTYPES[options.dtype]
    memory = Memory(options.rows, options.heads, options.slots, options.width, dtype)
    chunk = 4096
    for start in range(0, options.slots, chunk):
        pairs = torch.randn(2, options.rows, options.heads, chunk, options.width)
        memory.write(pairs[0], pairs[1], step=start)
    bank = MemoryBank(options.rows, {0: memory})
    print(f"{options.rows} rows x {options.slots} slots x {options.heads} heads x {options.width}")
    print("| MB | copy, s (training waits) | write, s | sync and digest, s | read and verify, s |")
    print("|---|---|---|---|---|")
    for repeat in range(options.repeats):
        shutil.rmtree(options.folder, ignore_errors=True)
        staging = options.folder / "staging"
        staging.mkdir(parents=True)
        times = [time.perf_counter()]
        part = RankPart(0, bank)
        times.append(time.perf_counter())
        path = part.write(staging)
        times.append(time.perf_counter())
        checkpoints.mark_done(staging, 0, [path])
        target = options.folder / "step.ckpt"
        checkpoints.finish(staging, target, 1, {"step": repeat})
        times.append(time.perf_counter())
        checkpoints.verify(target)
        times.append(time.perf_counter())
        size = (target / path.name).stat().st_size
        spans = [end - start for start, end in itertools.pairwise(times)]
        print(f"| {size / 1e6:.0f} | " + " | ".join(f"{span:.2f}" for span in spans) + " |")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
