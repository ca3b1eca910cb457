"""The memorizing transformer, plain torch."""

from .attention import Retrieval
from .config import MemoryConfig, ModelConfig
from .transformer import ModelOutput, Transformer

__all__ = ["MemoryConfig", "ModelConfig", "ModelOutput", "Retrieval", "Transformer"]
