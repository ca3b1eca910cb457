"""The memorizing transformer, plain torch."""

from .config import MemoryConfig, ModelConfig
from .copying import COPIES
from .gates import GATES, Gate
from .mixing import CopyHead
from .network import MemorizingNet, ModelOutput
from .reader import MemoryReader, Retrieval
from .transformer import Transformer

__all__ = [
    "COPIES",
    "GATES",
    "CopyHead",
    "Gate",
    "MemorizingNet",
    "MemoryConfig",
    "MemoryReader",
    "ModelConfig",
    "ModelOutput",
    "Retrieval",
    "Transformer",
]
