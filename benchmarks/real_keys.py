"""Keys and queries of a trained model, for benchmarks: random vectors flatter and slander searches.

    python benchmarks/real_keys.py --checkpoint runs/quickstart/version_0/checkpoints/last.ckpt \\
        --slots 65536 --out keys.pt

Reads documents, the longest first, in segments as in training, and writes what the first memory
layer would store: ``keys`` and ``values`` (heads, slots, width) and ``queries`` (heads, 512,
width), those of the 512 tokens that follow. Heads of several streams are stacked until there are
eight; no document is in two streams, and a stream takes more than one only where they are short.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from memorizing_transformers.data.settings import SourceSettings
from memorizing_transformers.data.sources.splits import open_sources
from memorizing_transformers.data.tokens.tokenizers import encode_document
from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.checkpoint.folder import read_manifest

HEADS = 8
QUERIES = 512


def long_streams(tokenizer: object, source: str, streams: int, length: int) -> Tensor:
    """Tokens (streams, length) of the training documents of a source, the longest first."""
    reading = open_sources(SourceSettings(source))[-1]
    documents = list(reading.source.documents(lambda name: reading.split_of(name) == "train"))
    documents.sort(key=lambda document: -len(document.text))
    rows, order = [], iter(documents)
    for _ in range(streams):
        parts, names = [], []
        while sum(len(part) for part in parts) < length:
            document = next(order, None)
            if document is None:
                raise SystemExit(f"--slots: {source} has no {streams} streams of {length} tokens")
            names.append(document.name)
            parts.append(
                torch.from_numpy(encode_document(tokenizer, document.text).astype("int64"))
            )
        rows.append(torch.cat(parts)[:length])
        print(f"stream of {length} tokens from {len(names)} documents, first {names[0]}")
    return torch.stack(rows)


@torch.inference_mode()
def main() -> None:
    """Parse, read, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--source", default="stdlib", help="as data.source of a config")
    parser.add_argument("--slots", type=int, default=65536)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    # What a layer stores does not depend on its memory: a small one will do.
    net = load_model(given.checkpoint, memory={"size": 1, "top_k": 1, "search": "exact"})
    segment = read_manifest(given.checkpoint)["data.segment_length"]
    streams = HEADS // net.config.kv_heads
    tokens = long_streams(net.tokenizer, given.source, streams, given.slots + QUERIES)
    bank, layer = net.new_memory(streams), net.config.memory_layers[0]
    keys, values, queries = [], [], []
    for ids in tokens.split(segment, dim=1):
        output = net(ids, bank)
        bank.commit(output.pairs)
        keys.append(output.pairs.memory[layer][0])
        values.append(output.pairs.memory[layer][1])
        queries.append(output.retrievals[layer].queries)
    made = {
        "keys": torch.cat(keys, 2)[:, :, : given.slots],
        "values": torch.cat(values, 2)[:, :, : given.slots],
        "queries": torch.cat(queries[-(-QUERIES // segment + 1) :], 2)[:, :, -QUERIES:],
    }
    torch.save({k: v.flatten(0, 1).contiguous().clone() for k, v in made.items()}, given.out)


if __name__ == "__main__":
    main()
