"""One measurement of `benchmarks/data.py`, in a process that has done nothing else before.

    python benchmarks/data_contestants.py prepare '{"source": …, "tokenizer": …, "out": …}'

Prints one line of JSON: seconds, tokens, a hash of them, and the most RAM that the process held.
"""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np


def fingerprint(documents: Iterable[Any]) -> dict[str, Any]:
    """The number of tokens and a hash of them and of where documents end.

    Args:
        documents: token ids of each, in order.
    """
    digest, count = hashlib.blake2b(digest_size=16), 0
    for tokens in documents:
        ids = np.asarray(tokens, dtype="<u4")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        count += len(ids)
    return {"tokens": count, "hash": digest.hexdigest()}


def prepare(given: dict[str, Any]) -> dict[str, Any]:
    """Our token store, by the function behind the command ``prepare``."""
    from memorizing_transformers.data import (
        CorpusSettings,
        SourceSettings,
        TokenizerSettings,
        TokenStore,
        prepare_store,
    )

    if given["imported"]:
        from transformers import AutoTokenizer  # noqa: F401
    sources = SourceSettings(given["source"], validation_fraction=0, test_fraction=0)
    settings = CorpusSettings(sources, TokenizerSettings(given["tokenizer"]))
    begun = time.perf_counter()
    folder = prepare_store(settings, Path(given["out"]), given["processes"])
    store = TokenStore(folder, "train")
    seconds = time.perf_counter() - begun
    # Before the tokens are looked at below: mapped pages count as RAM too.
    own, child = (resource.getrusage(who).ru_maxrss for who in
                  (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
    found = fingerprint(store.document(n) for n in range(len(store))) if given["parity"] else {}
    return {"seconds": seconds, "MB": (own + child) / 1024, **found}


def datasets_map(given: dict[str, Any]) -> dict[str, Any]:
    """`datasets`: JSON lines to Arrow, and `map` from Arrow to Arrow."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
    size = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    ids = datasets.Features({"ids": datasets.List(datasets.Value(np.dtype(size).name))})

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    files = sorted(map(str, Path(given["source"]).glob("*.jsonl")))
    begun = time.perf_counter()
    texts = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(Path(given["out"], "cache"))
    )
    loaded = time.perf_counter()
    done = texts.map(
        encode,
        batched=True,
        batch_size=given["batch"],
        num_proc=given["processes"],
        remove_columns=texts.column_names,
        features=ids,
    )
    ended = time.perf_counter()
    found = fingerprint(row["ids"] for row in done.with_format("numpy")) if given["parity"] else {}
    return {"seconds": ended - begun, "map alone": ended - loaded, **found}


def datatrove(given: dict[str, Any]) -> dict[str, Any]:
    """datatrove: one file a task, from JSON lines to its files of tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    out = Path(given["out"])
    steps = [
        JsonlReader(given["source"], glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(out / "tokens"),
            str(Path(given["tokenizer"], "tokenizer.json")),
            shuffle_documents=False,
            batch_size=given["batch"],
        ),
    ]
    tasks = given["processes"]
    # Forked: tasks that start anew would import everything once more each.
    executor = LocalPipelineExecutor(
        steps, tasks, tasks, logging_dir=str(out / "logs"), start_method="fork"
    )
    begun = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, **(fingerprint(_documents(out)) if given["parity"] else {})}


def _documents(out: Path) -> Iterable[Any]:
    """The documents in datatrove's files, in the order of the tasks."""
    for file in sorted(Path(out, "tokens").glob("*.ds")):
        size = int(Path(f"{file}.metadata").read_text().splitlines()[0].rpartition("|")[2])
        ends = np.fromfile(f"{file}.index", dtype="<u8").astype(np.int64)
        yield from np.split(np.fromfile(file, dtype=f"<u{size}"), ends[:-1])


def plan(given: dict[str, Any]) -> dict[str, Any]:
    """The plan of one pass over documents of drawn lengths, to train and to evaluate."""
    from memorizing_transformers.data import RowPlan

    draw = np.random.default_rng(0).lognormal(sigma=1, size=given["documents"])
    lengths = np.maximum(2, draw / draw.sum() * given["tokens"]).astype(np.int64)
    begun = time.perf_counter()
    train = RowPlan(lengths, given["rows"], given["segment"])
    train.locate(0, train.steps_per_epoch - 1)
    laid_out = time.perf_counter()
    RowPlan(lengths, given["rows"], given["segment"], train=False)
    return {
        "seconds": laid_out - begun,
        "evaluation": time.perf_counter() - laid_out,
        "tokens": int(lengths.sum()),
        "steps": train.steps_per_epoch,
    }


CONTESTANTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "datasets.map": datasets_map,
    "datatrove": datatrove,
    "plan": plan,
}


def main() -> None:
    """Measure what the command line names."""
    logging.disable(logging.WARNING)
    print(json.dumps(CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
