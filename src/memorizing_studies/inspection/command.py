"""``python -m memorizing_transformers inspect``: from a checkpoint and a text to a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memorizing_transformers.data.tokens.tokenized_text import (
    TokenizedText,
    name_of_token,
    read_text,
    tokenize,
)
from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.training.checkpoint.opening import (
    AnyModel,
    choose_segment,
    open_model,
    place,
)

from ..out_folder import out_folder
from .json_lines import write_lines
from .page import render
from .report import Report
from .trace import read_document

PAGE = "index.html"
LINES = "tokens.jsonl"


def choose_sizes(memory_sizes: str | None, model: AnyModel) -> list[int]:
    """The sizes to read with, ascending.

    Args:
        memory_sizes: one or two numbers with a comma between them; None for the checkpoint's own.
        model: the model.

    Raises:
        ConfigError: where they are no such numbers, or smaller than ``top_k``.
    """
    memory = model.config.memory
    if memory_sizes is None:
        if not memory.size:
            remedy = "the checkpoint's memory is switched off; give a size, e.g. 2048"
            raise ConfigError("memory_sizes", memory_sizes, remedy)
        return [memory.size]
    try:
        sizes = sorted({int(part) for part in str(memory_sizes).strip("[] ").split(",")})
    except ValueError as error:
        remedy = "must be one or two numbers of slots, e.g. 2048,8192"
        raise ConfigError("memory_sizes", memory_sizes, remedy) from error
    if len(sizes) > 2:
        raise ConfigError("memory_sizes", memory_sizes, "must be one or two sizes")
    if sizes[0] < memory.top_k:
        remedy = f"each must be at least the model's top_k ({memory.top_k}); 0 is read anyway"
        raise ConfigError("memory_sizes", memory_sizes, remedy)
    return sizes


def check_tokens(tokens: TokenizedText, document: str, vocab_size: int, segment: int) -> None:
    """Refuse what the model cannot read, or where no memory would be read.

    Raises:
        ConfigError: naming the document.
    """
    largest = int(tokens.ids.max(initial=0))
    if largest >= vocab_size:
        remedy = f"its tokenizer gives id {largest}, the model knows {vocab_size}; not its own"
        raise ConfigError("document", document, remedy)
    # Its first segment finds an empty memory, and its last token is only ever predicted.
    if len(tokens) <= segment + 1:
        remedy = (
            f"has {len(tokens)} tokens; the memory is first read after a segment of {segment}, so "
            f"give at least {segment + 2}, or a smaller segment_length"
        )
        raise ConfigError("document", document, remedy)


def learned_gates(model: AnyModel) -> dict[int, list[float]]:
    """By memory layer the share of each head that was learned; {} where it is not a number."""
    shares = {layer: reader.gate.learned() for layer, reader in model.readers().items()}
    return {layer: share.tolist() for layer, share in shares.items() if share is not None}


def examine(
    model: AnyModel,
    tokens: TokenizedText,
    segment: int,
    sizes: Sequence[int],
    retrieved: int = 4,
    document: str = "document",
    checkpoint: str = "model",
    step: int | None = None,
) -> Report:
    """Read a document with the memory off and with every size.

    Args:
        model: the model, in evaluation mode.
        tokens: the document.
        segment: tokens N read at once.
        sizes: slots of the memory, ascending.
        retrieved: neighbours kept of each head and query.
        document: its name, as the report shall show it.
        checkpoint: likewise.
        step: the training step of the weights, where it is known.

    Raises:
        UserError: where a loss is not finite.
    """
    traces = []
    for size in (0, *sizes):
        what = f"memory {size:,}" if size else "memory off"
        with tqdm(total=len(tokens) - 1, desc=what, unit=" tokens", disable=None) as bar:
            traces.append(read_document(model, tokens.ids, segment, size, retrieved, bar.update))
        if not np.isfinite(traces[-1].nats).all():
            raise UserError(
                f"ckpt_path: {checkpoint} gives losses that are not finite; try another"
            )
    silent = tokens.ids[np.diff(tokens.ends, prepend=0) == 0]
    names = {int(token): name_of_token(model.tokenizer, int(token)) for token in np.unique(silent)}
    return Report(
        document=document,
        checkpoint=checkpoint,
        step=step,
        segment=segment,
        settings=dataclasses.asdict(model.config),
        gates=learned_gates(model),
        tokens=tokens,
        names=names,
        traces=traces,
    )


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write the page and the JSON lines, each complete as soon as it has its name."""
    page, lines = folder / PAGE, folder / LINES
    draft = folder / f".{LINES}.partial"
    with tqdm(total=len(report.tokens), desc=LINES, unit=" tokens", disable=None) as bar:
        write_lines(report, draft, bar.update)
    draft.replace(lines)
    draft = folder / f".{PAGE}.partial"
    draft.write_text(render(report), encoding="utf-8", newline="\n")
    draft.replace(page)
    return page, lines


def inspect(
    ckpt_path: str,
    document: str,
    out: str,
    memory_sizes: str | None,
    segment_length: int | None,
    retrieved: int,
    device: str | None,
) -> None:
    """Do what the command says; its help describes the options.

    Raises:
        UserError: where one of them cannot work.
    """
    text = read_text(Path(document))
    model, manifest = open_model(ckpt_path)
    sizes = choose_sizes(memory_sizes, model)
    segment = choose_segment(segment_length, manifest, model.config.xl_cache)
    top_k = model.config.memory.top_k
    if not 1 <= retrieved <= top_k:
        raise ConfigError("retrieved", retrieved, f"must lie between 1 and top_k ({top_k})")
    tokens = tokenize(model.tokenizer, text)
    check_tokens(tokens, document, model.config.vocab_size or 0, segment)
    folder = out_folder(out)
    place(model, device)
    name, step = Path(document).name, manifest.get("step")
    report = examine(model, tokens, segment, sizes, retrieved, name, ckpt_path, step)
    page, lines = write(report, folder)
    for row in report.summary():
        what = f"memory {row['size']:,}" if row["size"] else "memory off"
        print(
            f"{what:<16} perplexity {row['perplexity']:.3f}, "
            f"bits per byte {row['bits_per_byte']:.4f}"
        )
    print(f"tokens: {len(tokens):,}")
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    print(f"JSON lines: {lines}")
