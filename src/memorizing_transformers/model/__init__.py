"""The memorizing transformer, plain torch."""

from .config import MemoryConfig, ModelConfig
from .gates import GATES, Gate
from .network import MemorizingNet, ModelOutput
from .reader import MemoryReader, Retrieval
from .transformer import Transformer

__all__ = [
    "GATES",
    "Gate",
    "MemorizingNet",
    "MemoryConfig",
    "MemoryReader",
    "ModelConfig",
    "ModelOutput",
    "Retrieval",
    "Transformer",
]
