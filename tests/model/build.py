"""Small models with every weight away from its start, and streams to read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from memorizing_transformers.memory import MemoryBank
from memorizing_transformers.model import ModelConfig, ModelOutput, Transformer
from memorizing_transformers.model.config import MemoryConfig

VOCAB = 23
COMBINES = ("gate", "fixed", "content", "joint", "evidence")


def small_config(**settings: Any) -> ModelConfig:
    """Two layers, the second with a memory of 7; keys of ``MemoryConfig`` go into it."""
    memory = {"size": 7, "top_k": 3, "layers": [-1], "bias_max_distance": 64}
    for key in [f.name for f in fields(MemoryConfig) if f.name in settings]:
        memory[key] = settings.pop(key)
    chosen = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "relative_buckets": 8,
        "relative_max_distance": 16,
    }
    return ModelConfig(**{**chosen, **settings, "memory": memory})


def small_model(config: ModelConfig | None = None, **settings: Any) -> Transformer:
    """A model whose biases, gates and norms say something too."""
    model = Transformer(config or small_config(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or {"bias", "gate", "copy_head", "match"} & {*name.split(".")}:
                parameter += torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale"):
                parameter[0] *= -1  # only its size counts
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def read(
    model: Transformer,
    bank: MemoryBank | None,
    tokens: Tensor,
    segment: int,
    resets: dict[int, list[bool]] | None = None,
) -> list[ModelOutput]:
    """Read (B, T) in segments and commit each; ``resets`` by segment number."""
    outputs = []
    for number, ids in enumerate(tokens.split(segment, dim=1)):
        if bank is not None and resets and number in resets:
            bank.reset(torch.tensor(resets[number]))
        outputs.append(model(ids, bank))
        if bank is not None:
            bank.commit(outputs[-1].pairs, token_ids=ids, step=number)
    return outputs


def logits_of(outputs: list[ModelOutput]) -> Tensor:
    """(B, T, V) of all segments."""
    return torch.cat([output.logits for output in outputs], dim=1)
