"""The memorizing transformer, plain torch."""

from .config import MemoryConfig, ModelConfig
from .copying import COPIES, CopyHead
from .gates import GATES, Gate
from .reader import MemoryReader, Retrieval
from .transformer import ModelOutput, Transformer

__all__ = [
    "COPIES",
    "GATES",
    "CopyHead",
    "Gate",
    "MemoryConfig",
    "MemoryReader",
    "ModelConfig",
    "ModelOutput",
    "Retrieval",
    "Transformer",
]
