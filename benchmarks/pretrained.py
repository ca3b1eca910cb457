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

from memorizing_transformers import MemorizedModel, memorize

BLOCK = 64
"""Tokens whose losses are summed before an error is computed, for neighbours are alike."""
BEFORE = 16384
"""Tokens that an arm with an XL cache alone reads before those that are scored."""
EIGHT = [17, 18, 20, 21, 22, 23, 24, 26]

ARMS: dict[str, dict[str, Any]] = {
    **{f"window-{size}": {"segment": size} for size in (512, 1024, 2048, 4096, 8192)},
    "xl": {"segment": 1024, "xl_cache": 1024},
    "memory": {"segment": 1024, "xl_cache": 1024, "memory": 32768},
    **{
        f"{segment}{'-xl' if cache else ''}{f'-{memory}' if memory else ''}": {
            "segment": segment,
            "xl_cache": segment * cache,
            "memory": memory,
        }
        for segment in (512, 1024, 2048)
        for cache in (0, 1)
        for memory in (0, 8192, 32768, 65536)
    },
}
"""By name: segment, XL cache, slots of the memory; also its layers, position and gate. A name such
as 1024-xl-8192 gives the three sizes; xl and memory are short for 1024-xl and 1024-xl-32768."""
for name, others in {
    "start": {"position": "start"},
    "one-layer": {"layers": [23]},
    "eight-layers": {"layers": EIGHT},
    "three-quarters": {"layers": [22]},
}.items():
    ARMS[name] = {**ARMS["memory"], **others}


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


class Below:
    """What the layers below every memory computes, kept for the arms that share it.

    Args:
        depth: layers that no memory reaches; 0 keeps nothing.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.kept: dict[int, torch.Tensor] = {}
        self.place = 0

    def record(self, model: Any) -> None:
        """Keep the output of the last of these layers."""
        if self.depth:
            layer = model.base.get_decoder().layers[self.depth - 1]
            layer.register_forward_hook(lambda *call: self.kept.update({self.place: call[2]}))

    def replay(self, model: Any) -> None:
        """Put what was kept in the place of these layers."""
        layers = model.base.get_decoder().layers
        for index in range(self.depth):
            layers[index] = Instead(self)
            model._hooks.pop(index, None)


class Instead(torch.nn.Module):
    """A layer that gives back what was kept."""

    def __init__(self, below: Below) -> None:
        super().__init__()
        self.below = below

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.below.kept[self.below.place]


@torch.inference_mode()
def read(
    model: Any, ids: torch.Tensor, arm: dict[str, Any], score: int, below: Below
) -> tuple[list[float], float]:
    """Summed losses of blocks of the last tokens, and CPU seconds a token there."""
    segment, slots = arm["segment"], arm.get("memory", 0)
    first = len(ids) - score
    bank = model.new_memory(1, size=slots) if slots or arm.get("xl_cache") else None
    # In the layers of others the first token that is read must be the first that they read.
    whole = slots or (bank and below.kept)
    start = 0 if whole else max(0, first - (BEFORE if bank else 0)) // segment * segment
    nats, seconds, count = [], 0.0, 0
    for begin in range(start, len(ids) - 1, segment):
        inputs, below.place = ids[None, begin : begin + segment], begin
        scored = begin + inputs.shape[1] > first
        begun = time.process_time()
        keep = {} if scored else {"logits_to_keep": 1}
        output = model(inputs, bank, **keep) if bank else model(inputs, **keep)
        if bank:
            bank.commit(output.pairs, token_ids=inputs)
        if scored:
            seconds += time.process_time() - begun
            count += inputs.shape[1]
            targets = ids[None, begin + 1 : begin + segment + 1]
            loss = model.loss(output.logits[:, : targets.shape[1]], targets, reduction="none")
            nats.append(loss[0][max(0, first - begin) :])
    losses = torch.cat(nats).double()
    return [float(block.sum()) for block in losses.split(BLOCK)], seconds / count


def make(folder: str, arm: dict[str, Any], search: str) -> Any:
    """The model of an arm: trained weights of the memory, or none."""
    memory = {"size": arm.get("memory", 0), "search": search}
    if "saved" in arm:
        return MemorizedModel.from_pretrained(arm["saved"], folder, memory=memory)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = arm.get("layers", "auto") if arm.get("memory") else []
    options = {k: arm[k] for k in ("xl_cache", "position") if k in arm}
    return memorize(base, memory, layers, **options).eval()


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
        "--arms", nargs="+", default=["window-1024", "xl", "memory"], help=", ".join(ARMS)
    )
    parser.add_argument(
        "--saved",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="trained models, other arms; a name that ends in -off is read without the memory",
    )
    parser.add_argument(
        "--share",
        type=int,
        default=17,
        help="layers below every memory, computed once for the arms of one segment and XL cache",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="read of each document")
    parser.add_argument("--score", type=int, default=4096, help="of them, the last are scored")
    parser.add_argument("--search", default="bucketed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pretrained.json"))
    given = parser.parse_args()
    arms = dict(ARMS)
    for name, folder in (pair.split("=", 1) for pair in given.saved):
        arms[name] = {**ARMS["xl" if name.endswith("-off") else "memory"], "saved": folder}
        given.arms.append(name)
    for name in given.arms:
        if name not in arms:
            parser.error(f"--arms {name}: known are {', '.join(arms)}")
    results: dict[str, Any] = {"circumstances": circumstances(), "corpora": {}}
    if given.out.is_file():
        results = json.loads(given.out.read_text())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    corpora = {
        path.name.split(".")[0]: texts(path, tokenizer, given.tokens, given.count)
        for path in given.documents
    }
    shared: dict[tuple[int, int], list[str]] = {}
    for name in given.arms:
        arm = arms[name]
        shared.setdefault((arm["segment"], arm.get("xl_cache", 0)), []).append(name)
    for names in shared.values():
        models: dict[tuple[str, bool], Any] = {}
        below = Below(given.share if len(names) > 1 else 0)
        for corpus, documents in corpora.items():
            for title, ids in documents:
                done = results["corpora"].setdefault(corpus, {}).setdefault(title, {})
                missing = [name for name in names if name not in done]
                # The first one reads all that the others read.
                missing.sort(key=lambda name: not arms[name].get("memory"))
                below.kept.clear()
                for place, name in enumerate(missing):
                    again = place > 0 and below.depth > 0
                    if (name, again) not in models:
                        model = models[name, again] = make(given.model, arms[name], given.search)
                        (below.replay if again else below.record)(model)
                    model = models[name, again]
                    blocks, seconds = read(model, ids, arms[name], given.score, below)
                    count = given.score - 1
                    done[name] = {"blocks": blocks, "tokens": count}
                    if not again:
                        done[name]["seconds_per_token"] = seconds
                    given.out.write_text(json.dumps(results))
                    perplexity = math.exp(sum(blocks) / count)
                    print(f"{name} {corpus} {title}: {perplexity:.3f}", flush=True)
    print(table(results, given.arms))


if __name__ == "__main__":
    main()
