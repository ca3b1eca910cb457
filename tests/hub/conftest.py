"""A folder with an exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported import TEXT, small

from memorizing_transformers.data.tokens.tokenizers import train_bpe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a model with a BPE tokenizer and no weight at its start was saved."""
    tokenizer = train_bpe([TEXT * 20], 270)
    model = small(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
