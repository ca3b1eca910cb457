"""Keys and queries of a trained model, for benchmarks: random vectors flatter and slander searches.

    python benchmarks/real_keys.py --config runs/quickstart/version_0/config.yaml \\
        --checkpoint runs/quickstart/version_0/checkpoints/last.ckpt --slots 65536 --out keys.pt

Reads training documents one after the other and writes what the first memory layer would store:
``keys`` and ``values`` (heads, slots, width) and ``queries`` (heads, 512, width), those of the 512
tokens that follow. Heads of several streams are stacked until there are eight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from memorizing_transformers.data.datamodule import DocumentDataModule
from memorizing_transformers.model import ModelConfig, Transformer

HEADS = 8
QUERIES = 512


def load_model(config: dict, checkpoint: Path, vocab_size: int) -> Transformer:
    """The trained network with the memory it was trained with."""
    model = {k: v for k, v in config["model"].items() if k in ModelConfig.__dataclass_fields__}
    model["vocab_size"] = model.get("vocab_size") or vocab_size
    net = Transformer(ModelConfig(**model)).eval()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k[:4] == "net."})
    return net


@torch.inference_mode()
def main() -> None:
    """Parse, read, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=65536)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text())
    data = DocumentDataModule(**{**config["data"], "batch_rows": 1})
    data.prepare_data()
    store = data.train_store
    net = load_model(config, given.checkpoint, data.vocab_size)
    streams = HEADS // net.config.kv_heads
    needed = streams * (given.slots + QUERIES)
    documents, count = [], 0
    while count < needed:
        tokens = torch.from_numpy(store.document(len(documents) % len(store)).astype("int64"))
        documents.append(tokens)
        count += len(tokens)
    tokens = torch.cat(documents)[:needed].view(streams, -1)
    bank, layer = net.new_memory(streams), net.config.memory_layers[0]
    pairs, retrieval = [], None
    for segment in tokens.split(QUERIES, dim=1):
        output = net(segment, bank)
        bank.commit(output.pairs)
        pairs.append(output.pairs[layer])
        retrieval = output.retrievals[layer]
    assert retrieval is not None
    keys, values = (torch.cat(part, 2)[:, :, : given.slots] for part in zip(*pairs, strict=True))
    made = {"keys": keys, "values": values, "queries": retrieval.queries}
    torch.save({k: v.flatten(0, 1).contiguous().clone() for k, v in made.items()}, given.out)


if __name__ == "__main__":
    main()
