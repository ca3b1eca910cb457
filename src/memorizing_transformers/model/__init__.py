"""The memorizing transformer, plain torch."""

from .config import MemoryConfig, ModelConfig
from .gates import GATES, Gate
from .reader import MemoryReader, Retrieval
from .transformer import ModelOutput, Transformer

__all__ = [
    "GATES",
    "Gate",
    "MemoryConfig",
    "MemoryReader",
    "ModelConfig",
    "ModelOutput",
    "Retrieval",
    "Transformer",
]
