"""What a memory gains a pretrained model, without training: perplexity of the ends of documents.

    make smollm2
    python benchmarks/pretrained.py --documents data/latex.jsonl.gz --arms window-1024 xl memory

Each arm reads the first ``--tokens`` tokens of a document in segments and is scored on the last
``--score`` of them. Arms without a memory begin to read later, where that changes next to nothing.
Results are added to a JSON file, so a run that was stopped goes on; nothing is measured twice.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from measure import circumstances
from transformers import AutoModelForCausalLM, AutoTokenizer

from memorizing_transformers import memorize

BLOCK = 64
"""Tokens whose losses are summed before an error is computed, for neighbours are alike."""
ARMS: dict[str, dict[str, Any]] = {
    **{f"window-{size}": {"segment": size} for size in (512, 1024, 2048, 4096, 8192)},
    "xl": {"segment": 1024, "xl_cache": 1024},
    "memory": {"segment": 1024, "xl_cache": 1024, "memory": 32768},
    "memory-start": {"segment": 1024, "xl_cache": 1024, "memory": 32768, "position": "start"},
    "memory-8192": {"segment": 1024, "xl_cache": 1024, "memory": 8192},
    "memory-no-xl": {"segment": 1024, "memory": 32768},
    "memory-3/4": {"segment": 1024, "xl_cache": 1024, "memory": 32768, "layers": [22]},
    "memory-joint-8": {
        "segment": 1024,
        "xl_cache": 1024,
        "memory": 32768,
        "layers": [17, 18, 20, 21, 22, 23, 24, 26],
    },
    "memory-2048": {"segment": 2048, "memory": 65536},
}
"""By name: segment, XL cache, slots of the memory, its layers."""


def texts(path: Path, tokenizer: Any, tokens: int, count: int) -> list[tuple[str, torch.Tensor]]:
    """The first documents of a file of JSON lines that are long enough, cut to ``tokens``."""
    found: list[tuple[str, torch.Tensor]] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            document = json.loads(line)
            text = document["text"][: 12 * tokens]
            if len(text) < 1.5 * tokens:
                continue
            ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
            if len(ids) >= tokens:
                found.append((document.get("title", str(len(found))), ids[:tokens]))
            if len(found) == count:
                break
    return found


@torch.inference_mode()
def read(
    model: Any, ids: torch.Tensor, arm: dict[str, Any], score: int
) -> tuple[list[float], float]:
    """Summed losses of blocks of the last tokens, and CPU seconds a token there."""
    segment, slots = arm["segment"], arm.get("memory", 0)
    first = len(ids) - score
    bank = model.new_memory(1, size=slots) if slots or arm.get("xl_cache") else None
    start = 0 if slots else max(0, first - (16384 if bank else 0)) // segment * segment
    nats, seconds, count = [], 0.0, 0
    for begin in range(start, len(ids) - 1, segment):
        inputs = ids[None, begin : begin + segment]
        begun = time.process_time()
        output = model(inputs, bank) if bank else model(inputs)
        if bank:
            bank.commit(output.pairs, token_ids=inputs)
        if begin + inputs.shape[1] > first:
            seconds += time.process_time() - begun
            count += inputs.shape[1]
            targets = ids[None, begin + 1 : begin + segment + 1]
            loss = model.loss(output.logits[:, : targets.shape[1]], targets, reduction="none")
            nats.append(loss[0][max(0, first - begin) :])
    losses = torch.cat(nats).double()
    return [float(block.sum()) for block in losses.split(BLOCK)], seconds / count


def table(results: dict[str, Any], arms: list[str]) -> str:
    """Perplexity of each arm by corpus, and the gain over the first arm with its error."""
    lines = ["| corpus | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for corpus, documents in results["corpora"].items():
        cells = []
        for arm in arms:
            done = [d for d in documents.values() if arm in d and arms[0] in d]
            if not done:
                cells.append("")
                continue
            own = torch.tensor([x for d in done for x in d[arm]["blocks"]]).double()
            base = torch.tensor([x for d in done for x in d[arms[0]]["blocks"]]).double()
            count = sum(d[arm]["tokens"] for d in done)
            difference = own - base
            error = float(difference.std() * math.sqrt(len(own)) / count)
            gain = float(difference.sum() / count)
            cell = f"{math.exp(float(own.sum()) / count):.3f}"
            if arm != arms[0]:
                cell += f" ({100 * math.expm1(gain):+.1f} ± {100 * error:.1f} %)"
            cells.append(cell)
        lines.append(f"| {corpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="data/models/smollm2-135m")
    parser.add_argument("--documents", type=Path, nargs="+", required=True, help="JSON lines")
    parser.add_argument("--count", type=int, default=3, help="documents of each file")
    parser.add_argument(
        "--arms", nargs="+", choices=[*ARMS], default=["window-1024", "xl", "memory"]
    )
    parser.add_argument("--tokens", type=int, default=32768, help="read of each document")
    parser.add_argument("--score", type=int, default=4096, help="of them, the last are scored")
    parser.add_argument("--search", default="bucketed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pretrained.json"))
    given = parser.parse_args()
    results: dict[str, Any] = {"circumstances": circumstances(), "corpora": {}}
    if given.out.is_file():
        results = json.loads(given.out.read_text())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    corpora = {
        path.name.split(".")[0]: texts(path, tokenizer, given.tokens, given.count)
        for path in given.documents
    }
    for name in given.arms:
        arm, model = ARMS[name], None
        for corpus, documents in corpora.items():
            for title, ids in documents:
                done = results["corpora"].setdefault(corpus, {}).setdefault(title, {})
                if name in done:
                    continue
                if model is None:
                    base = AutoModelForCausalLM.from_pretrained(given.model).eval()
                    memory = {"size": arm.get("memory", 0), "search": given.search}
                    layers = arm.get("layers", "auto") if arm.get("memory") else []
                    options = {k: arm[k] for k in ("xl_cache", "position") if k in arm}
                    model = memorize(base, memory, layers, **options).eval()
                blocks, seconds = read(model, ids, arm, given.score)
                count = given.score - 1
                done[name] = {"blocks": blocks, "tokens": count, "seconds_per_token": seconds}
                given.out.write_text(json.dumps(results))
                perplexity = math.exp(sum(blocks) / count)
                print(
                    f"{name} {corpus} {title}: {perplexity:.3f}, {1e3 * seconds:.2f} ms", flush=True
                )
    print(table(results, given.arms))


if __name__ == "__main__":
    main()
