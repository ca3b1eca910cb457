"""Documents: text sources, tokenizers, the token store, the row plan and the DataModule.

The names below are imported on first use, so that preparing text needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import IGNORE_INDEX, Batch
    from .datamodule import DocumentDataModule
    from .loader import SegmentLoader
    from .plan import RowPlan
    from .prepare import prepare_store
    from .settings import CorpusSettings, SourceSettings, TokenizerSettings
    from .store import TokenStore
    from .tokenization import byte_tokenizer, encode_document, load_tokenizer, train_bpe

_HOMES = {
    "IGNORE_INDEX": ".batch",
    "Batch": ".batch",
    "CorpusSettings": ".settings",
    "DocumentDataModule": ".datamodule",
    "RowPlan": ".plan",
    "SegmentLoader": ".loader",
    "SourceSettings": ".settings",
    "TokenStore": ".store",
    "TokenizerSettings": ".settings",
    "byte_tokenizer": ".tokenization",
    "encode_document": ".tokenization",
    "load_tokenizer": ".tokenization",
    "prepare_store": ".prepare",
    "train_bpe": ".tokenization",
}

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "CorpusSettings",
    "DocumentDataModule",
    "RowPlan",
    "SegmentLoader",
    "SourceSettings",
    "TokenStore",
    "TokenizerSettings",
    "byte_tokenizer",
    "encode_document",
    "load_tokenizer",
    "prepare_store",
    "train_bpe",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
