"""Memorizing Transformers on PyTorch Lightning.

The names below are imported on first use, so that worker processes and ``--help`` stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .memory import MemoryBank
    from .model import MemoryConfig, ModelConfig
    from .pretrained.hub import MemorizingTransformer
    from .pretrained.memorize import memorize
    from .pretrained.memorized import MemorizedModel

_HOMES = {
    "MemorizedModel": ".pretrained.memorized",
    "MemorizingTransformer": ".pretrained.hub",
    "MemoryBank": ".memory",
    "MemoryConfig": ".model",
    "ModelConfig": ".model",
    "memorize": ".pretrained.memorize",
}

__all__ = [
    "MemorizedModel",
    "MemorizingTransformer",
    "MemoryBank",
    "MemoryConfig",
    "ModelConfig",
    "memorize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
