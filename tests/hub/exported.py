"""A small model and a text for it."""

from __future__ import annotations

from typing import Any

from memorizing_transformers import MemorizingTransformer

TEXT = "The quick brown fox jumps over the lazy dog"
SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2}


def small(**settings: Any) -> MemorizingTransformer:
    memory = {"size": 64, "top_k": 4, "combine": "content", "position_bias": "t5", "layers": [1]}
    return MemorizingTransformer(**{**SMALL, "memory": memory, **settings}).eval()
