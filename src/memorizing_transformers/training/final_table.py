"""The table at the end of a run: the same weights with memory and with memory switched off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from .callbacks import Throughput
from .module import MemorizingLM

METRICS = ("perplexity", "bits_per_byte", "accuracy")


@contextmanager
def memory_size(module: MemorizingLM, size: int) -> Iterator[None]:
    """Give new banks another number of slots; 0 switches the memory off."""
    module.memory_size = size
    try:
        yield
    finally:
        module.memory_size = None


@contextmanager
def silent(trainer: Any) -> Iterator[None]:
    """Log nothing: figures of a switched-off memory do not belong on the run's curves."""
    loggers = trainer.loggers
    trainer.loggers = []
    try:
        yield
    finally:
        trainer.loggers = loggers


def has_documents(datamodule: LightningDataModule, split: str) -> bool:
    """Whether the split exists."""
    try:
        return bool(getattr(datamodule, f"{split}_store"))
    except UserError:
        return False


def evaluate(
    trainer: Any, module: MemorizingLM, datamodule: LightningDataModule
) -> list[dict[str, Any]]:
    """Validation and test figures with the configured memory and, if there is one, without.

    A split without documents, or limited to no batch, is left out.
    """
    sizes = [module.config.memory.size, 0] if module.memory_layers else [0]
    rows = []
    for split, run in (("validation", trainer.validate), ("test", trainer.test)):
        if not has_documents(datamodule, split):
            continue
        for size in sizes:
            with memory_size(module, size), silent(trainer):
                figures = run(module, datamodule=datamodule, verbose=False)
            if not figures:
                break
            named = {name.split("/")[1]: value for name, value in figures[0].items()}
            rows.append({"split": split, "memory": size, **{m: named[m] for m in METRICS}})
    return rows


def final_report(trainer: Any, module: MemorizingLM, datamodule: LightningDataModule) -> None:
    """Evaluate, print the table and keep it as ``report.json`` in the run's folder."""
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), Throughput())
    speed = throughput.tokens / throughput.seconds if throughput.seconds else None
    log_dir = trainer.log_dir  # a collective, so not to be asked for on one rank alone
    folder = log_dir or trainer.default_root_dir
    checkpoint = trainer.saved_now(weights_only=True)  # evaluation forgets what fit has taken
    rows = evaluate(trainer, module, datamodule)
    if not trainer.is_global_zero:
        return
    table = Table(title="The same weights, with memory and with memory switched off")
    for heading in ("split", "memory", "perplexity", "bits per byte", "accuracy"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for row in rows:
        size = f"{row['memory']:,}" if row["memory"] else "off"
        table.add_row(
            row["split"],
            size,
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['accuracy']:.4f}",
        )
    console = Console()
    console.print(table)
    if speed is not None:
        minutes = throughput.seconds / 60
        console.print(f"training: {speed:,.0f} tokens/s, {minutes:.1f} minutes")
    console.print(f"checkpoint: {checkpoint or 'none holds these weights'}", soft_wrap=True)
    console.print(f"curves: tensorboard --logdir {Path(folder).parent}", soft_wrap=True)
    if log_dir:
        record = {"rows": rows, "tokens_per_second": speed, "seconds": throughput.seconds}
        Path(folder, "report.json").write_text(json.dumps(record, indent=2) + "\n")
