"""The commands that this package adds to ``python -m memorizing_transformers``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal


def inspect(
    ckpt_path: str,
    document: str,
    out: str = "report",
    memory_sizes: str | None = None,
    segment_length: int | None = None,
    retrieved: int = 4,
    device: str | None = None,
) -> None:
    """Show what the memory does for a text: one HTML page, and the same as JSON lines.

    Reads the text with the memory switched off and with it, and keeps for every token what it
    gained and what each head retrieved.

    Example: python -m memorizing_transformers inspect --ckpt_path last.ckpt --document FILE

    Args:
        ckpt_path: A checkpoint, or a folder that export wrote.
        document: A text file in UTF-8.
        out: Folder for index.html and tokens.jsonl.
        memory_sizes: One or two sizes of the memory, e.g. 2048,8192. Default: the checkpoint's.
        segment_length: Tokens read at once. Default: that of the training run.
        retrieved: Neighbours kept for each head and token, those with the largest weight first.
        device: Device, e.g. cpu or cuda:0. Default: a GPU if there is one.
    """
    from .inspection.command import inspect as show

    show(ckpt_path, document, out, memory_sizes, segment_length, retrieved, device)


def ablate(
    plan: str,
    jobs: int | None = None,
    threads: int | None = None,
    overrides: Any = None,
    out: str | None = None,
    check: bool = False,
    executor: Literal["local", "slurm"] = "local",
    slurm: dict[str, Any] | None = None,
) -> None:
    """Run a plan of ablations and write its table. The same command resumes a stopped plan.

    Example: python -m memorizing_transformers ablate --plan configs/ablations/components.yaml

    Args:
        plan: The plan, a YAML file; docs/ablations.md explains its keys.
        jobs: Number of runs at the same time, each in its own process or SLURM job. Default: 1, or
            all that can start with executor=slurm. 0 = one after the other, in this process.
        threads: CPU threads per run. Default: OMP_NUM_THREADS if set, else CPU count / jobs; with
            executor=slurm, slurm.cpus_per_task.
        overrides: Changes of the base for all variants, e.g. '{data.source: texts/}'.
        out: Folder for the runs and the table. Default: the plan's.
        check: Build every variant's config and stop before anything runs.
        executor: local = processes of this machine, slurm = jobs of a SLURM cluster.
        slurm: Options of sbatch for each run, e.g. '{partition: gpu, gpus_per_node: 1,
            cpus_per_task: 8, time: 720}' with time in minutes. Default: time: 1440.
    """
    from .ablation.plan import check as check_plan
    from .ablation.plan_file import load_plan
    from .ablation.runner import make_executor, run_plan

    loaded = load_plan(plan, overrides, out)
    where = make_executor(executor, jobs, threads, slurm)
    if check:
        print(
            f"{plan}: {len(check_plan(loaded))} variants, seeds {', '.join(map(str, loaded.seeds))}"
        )
        return
    # SIGTERM acts as Ctrl-C: the runs are told to stop, and can resume.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        trials = run_plan(loaded, where)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    print(Path(loaded.out, "table.md").read_text(encoding="utf-8"))
    print(f"results: {loaded.out}")
    if any(trial.failure is not None for trial in trials):
        sys.exit(1)


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "ablate": ablate}
