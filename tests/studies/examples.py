"""Models whose retrievals are known, checkpoints of them, and documents to read."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import word_tokenizer
from numpy.typing import NDArray

from memorizing_studies.inspection.command import examine
from memorizing_studies.inspection.report import Report
from memorizing_transformers import MemorizingTransformer
from memorizing_transformers.data.tokens.tokenized_text import tokenize
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.training.checkpoint.export import (
    SETTINGS_KEY,
    TOKENIZER_KEY,
    pack_tokenizer,
)
from memorizing_transformers.training.checkpoint.folder import (
    TRAINER_FILE,
    finish,
    mark_done,
    rank_file,
)

SEGMENT = 16


def small_model(**settings: Any) -> MemorizingTransformer:
    """Two layers on bytes, the second with a memory of 32; keys of ``MemoryConfig`` go into it."""
    memory = {"size": 32, "top_k": 4, "layers": [-1]}
    for key in ("size", "top_k", "layers", "combine", "search"):
        if key in settings:
            memory[key] = settings.pop(key)
    fields = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 256}
    torch.manual_seed(0)
    model = MemorizingTransformer(**{**fields, **settings}, memory=memory)
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter += torch.randn(parameter.shape)
    return model.eval()


def identity_model(words: list[str], **memory: Any) -> MemorizingTransformer:
    """A layer whose queries and keys are the tokens' embeddings, so that a query finds its own
    token wherever it stands in the memory."""
    settings = {"top_k": 4, "layers": [0], **memory}
    torch.manual_seed(0)
    model = MemorizingTransformer(
        vocab_size=len(words), d_model=128, num_layers=1, num_heads=2, d_ff=8, memory=settings
    )
    attention: Any = model.layers[0].attention
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(128))
        attention.key.weight.copy_(torch.eye(128))
    model.tokenizer = word_tokenizer(words)
    return model.eval()


def planted(length: int, plants: dict[str, tuple[int, int]]) -> tuple[str, list[str]]:
    """A text of filler with names in it, and its vocabulary.

    Args:
        length: words in all.
        plants: by name where it is defined and where it is used; either is followed by its value,
            the name in capitals, which stands nowhere else.
    """
    draw = random.Random(0)
    filler = [f"w{i}" for i in range(200)]
    words = [draw.choice(filler) for _ in range(length)]
    for name, places in plants.items():
        for place in places:
            words[place : place + 2] = [name, name.upper()]
    return " ".join(words), [*filler, *plants, *(name.upper() for name in plants)]


def report_on(
    text: str, model: MemorizingTransformer, sizes: tuple[int, ...] = (32,), **options: Any
) -> Report:
    """A report, in segments of 16 unless told otherwise."""
    settings = {"segment": SEGMENT, "retrieved": 3, "document": "story.txt", **options}
    tokens = tokenize(model.tokenizer, text)
    return examine(model, tokens, sizes=sizes, **settings)


def bytes_of(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def save_checkpoint(model: MemorizingTransformer, folder: Path, segment: int = SEGMENT) -> Path:
    """The parts of a training run's checkpoint that say what the model is."""
    staging = folder.with_suffix(".partial")
    staging.mkdir(parents=True)
    content = {
        "state_dict": {f"net.{name}": value for name, value in model.state_dict().items()},
        SETTINGS_KEY: asdict(model.config),
        TOKENIZER_KEY: pack_tokenizer(byte_tokenizer()),
    }
    torch.save(content, staging / TRAINER_FILE)
    (staging / rank_file(0)).write_bytes(b"")
    mark_done(staging, 0, [staging / TRAINER_FILE, staging / rank_file(0)])
    finish(staging, folder, 1, {"step": 12, "data.segment_length": segment})
    return folder
