"""Documents: text sources, tokenizers, the token store, the row plan and the DataModule.

The names below are imported on first use, so that preparing text does not need torch or Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import IGNORE_INDEX, Batch
    from .datamodule import DocumentDataModule
    from .loader import SegmentLoader
    from .row_plan import RowPlan
    from .settings import CorpusSettings, SourceSettings, TokenizerSettings
    from .tokens.prepare import prepare_store
    from .tokens.store import TokenStore
    from .tokens.tokenizers import byte_tokenizer, encode_document, load_tokenizer, train_bpe

_HOMES = {
    "IGNORE_INDEX": ".batch",
    "Batch": ".batch",
    "CorpusSettings": ".settings",
    "DocumentDataModule": ".datamodule",
    "RowPlan": ".row_plan",
    "SegmentLoader": ".loader",
    "SourceSettings": ".settings",
    "TokenStore": ".tokens.store",
    "TokenizerSettings": ".settings",
    "byte_tokenizer": ".tokens.tokenizers",
    "encode_document": ".tokens.tokenizers",
    "load_tokenizer": ".tokens.tokenizers",
    "prepare_store": ".tokens.prepare",
    "train_bpe": ".tokens.tokenizers",
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
