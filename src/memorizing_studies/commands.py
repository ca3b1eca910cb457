"""The commands that this package adds to ``python -m memorizing_transformers``."""

from __future__ import annotations

import os
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


def suffix_cache(predictions: str, window: int | None = None) -> None:
    """Show what a cache of exact repetitions adds to a model that is not trained for it.

    Reads what `python train.py predict` wrote, so it fits every model, and prints the perplexity
    of each document with the cache and without. A memory should be better than this.

    Example: python -m memorizing_transformers suffix-cache --predictions predictions.parquet

    Args:
        predictions: A predictions.parquet, or a folder of its parts.
        window: Tokens back to which repetitions count. Default: the complete document.
    """
    from .rivals.suffix_cache import suffix_cache as show

    show(predictions, window)


def serve(
    model: str,
    memory: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_upload: int = 10_000_000,
    max_new_tokens: int = 1024,
    max_conversations: int = 16,
    idle_minutes: float = 60.0,
    segment_length: int | None = None,
    memory_size: int | None = None,
    device: str | None = None,
) -> None:
    """Serve a model and what it remembers, in the manner of OpenAI's API.

    Clients can open conversations and upload documents to them. Each conversation has a memory of
    its own, which ends with it.

    Example: python -m memorizing_transformers serve --model model --memory book.memory

    Args:
        model: A checkpoint, a folder of export, or the folder or hub name of a pretrained model.
        memory: Files that remember wrote, or folders of them; every conversation reads them.
        host: Address to listen at. 127.0.0.1 = this machine alone, 0.0.0.0 = all machines.
        port: Port to listen at.
        token: What clients must give as api_key. Default: MEMORIZING_TOKEN if set, else none.
        max_upload: Bytes of an uploaded document, at most.
        max_new_tokens: Tokens of an answer, at most.
        max_conversations: Conversations open at once, at most; each can hold a complete memory.
        idle_minutes: Minutes after which a conversation that nobody uses ends.
        segment_length: Tokens that are read at once. Default: as in training, else the length of
            the XL cache, else 512.
        memory_size: Slots of each memory, which keep the newest pairs; 0 = nothing is remembered.
            Default: as in training, and for files of memory as they were written.
        device: Where to compute. Default: a GPU where there is one.
    """
    from memorizing_transformers.errors import ConfigError

    for name, value in (
        ("max_upload", max_upload),
        ("max_new_tokens", max_new_tokens),
        ("max_conversations", max_conversations),
        ("idle_minutes", idle_minutes),
    ):
        if not value > 0:
            raise ConfigError(name, value, "must be above 0")
    try:
        from .serving.server import Served, run
    except ModuleNotFoundError as error:
        remedy = "needs LitServe; pip install -e '.[serve]'"
        raise ConfigError("serve", model, remedy) from error
    served = Served(
        model,
        memory or [],
        segment_length,
        memory_size,
        device,
        max_new_tokens,
        max_conversations,
        idle_minutes,
        token or os.environ.get("MEMORIZING_TOKEN") or None,
        f"http://{host}:{port}/v1",
    )
    run(served, host, port, max_upload)


def tasks(
    model: str,
    data: list[str] | None = None,
    control: str | None = None,
    reference: str | None = None,
    out: str = "tasks",
    tasks: list[str] | None = None,
    items: str | None = None,
    background: list[str] | None = None,
    seed: int = 0,
    questions: int = 200,
    candidates: int = 128,
    min_distance: int = 256,
    max_tokens: int = 65536,
    max_documents: int = 16,
    text_column: str = "text",
    segment_length: int | None = None,
    memory_size: int | None = None,
    device: str | None = None,
) -> None:
    """Show what a memory finds: names, facts and copies from far back, by distance.

    Each task is scored with the memory, with the memory switched off, and for the control. The
    folder holds the tables, a plot for each task, one page and the items.

    Example: python -m memorizing_transformers tasks --model MODEL --control CONTROL --data x.jsonl

    Args:
        model: A checkpoint, a folder of export, or the folder or hub name of a pretrained model.
        data: Documents: text files, folders, or records as JSON lines or Parquet.
        control: A model trained without memory, to compare with.
        reference: A model with memory that finds the tokens of the task key-tokens; the same one
            for all models that are compared. Default: the task is left out.
        out: Folder for the results.
        tasks: Names of the tasks. Default: all.
        items: The items.json of an earlier run with the same data. Default: items are made.
        background: Texts of the training, so that boilerplate is known. Default: other documents.
        seed: Seed of all that is drawn.
        questions: Choices of each task, at most about so many.
        candidates: Candidates of a choice, at most.
        min_distance: Tokens of the model, the shortest distance.
        max_tokens: Tokens of a document that are looked at.
        max_documents: Documents that are looked at.
        text_column: Column of records that holds the text.
        segment_length: Tokens that are read at once. Default: as in training, else the length of
            the XL cache, else 512.
        memory_size: Slots of each memory. Default: as in training.
        device: Where to compute. Default: a GPU where there is one.
    """
    from .tasks.running import Request, run
    from .tasks.task import Settings

    settings = Settings(seed, questions, candidates, min_distance, max_tokens)
    run(
        Request(
            model,
            data or [],
            control,
            reference,
            out,
            tasks,
            items,
            background or [],
            settings,
            max_documents,
            text_column,
            segment_length,
            memory_size,
            device,
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "ablate": ablate,
    "suffix-cache": suffix_cache,
    "serve": serve,
    "tasks": tasks,
}
