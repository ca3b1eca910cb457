"""From a checkpoint to a model that needs no trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.tokens.tokenizers import fingerprint_tokenizer, load_tokenizer
from ...errors import ConfigError
from ...pretrained.hub import MemorizingTransformer
from ...pretrained.memorized import MemorizedModel
from ...pretrained.saved import build
from .folder import open_checkpoint

SETTINGS_KEY = "model_settings"
"""Where a checkpoint keeps the fields of ``ModelConfig``."""

BASE_KEY = "base_settings"
"""Where a checkpoint of a pretrained model with a memory keeps what ``pretrained.saved`` needs."""

TOKENIZER_KEY = "tokenizer_files"
"""Where a checkpoint keeps its tokenizer: file names to bytes, as uint8 tensors."""


def pack_tokenizer(tokenizer: Any) -> dict[str, Tensor]:
    """The files of a saved tokenizer as tensors, which load without executing anything."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())
            for path in sorted(Path(folder).iterdir())
        }


def unpack_tokenizer(files: dict[str, Tensor]) -> Any:
    """The tokenizer that ``pack_tokenizer`` packed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, Path(name).name).write_bytes(content.numpy().tobytes())
        return load_tokenizer(folder)


def is_packed(files: dict[str, Tensor], tokenizer: Any) -> bool:
    """Whether ``pack_tokenizer`` packed a tokenizer that gives every text the same ids."""
    return fingerprint_tokenizer(unpack_tokenizer(files)) == fingerprint_tokenizer(tokenizer)


def load_model(ckpt_path: str | Path, **overrides: Any) -> MemorizingTransformer | MemorizedModel:
    """The trained model of a checkpoint, on the CPU, in evaluation mode, with its tokenizer.

    Args:
        ckpt_path: a checkpoint folder of this project.
        overrides: run-time settings that replace the saved ones; of ``memory`` those that are
            given, e.g. ``memory={"size": 65536}``.

    Raises:
        UserError: where the folder is missing, damaged or not such a checkpoint.
    """
    if not Path(ckpt_path).is_dir():
        raise ConfigError("ckpt_path", str(ckpt_path), "there is no such checkpoint folder")
    checkpoint = open_checkpoint(Path(ckpt_path))
    weights = checkpoint["state_dict"]
    weights = {name.removeprefix("net."): value for name, value in weights.items()}
    tokenizer = None
    if TOKENIZER_KEY in checkpoint:
        tokenizer = unpack_tokenizer(checkpoint[TOKENIZER_KEY])
    if BASE_KEY in checkpoint:
        memorized = build(checkpoint[BASE_KEY], **overrides)
        memorized.load_state_dict(weights)
        memorized.tokenizer = tokenizer
        return memorized
    saved = checkpoint[SETTINGS_KEY]
    memory = {**saved["memory"], **overrides.pop("memory", {})}
    settings = {**saved, **overrides, "memory": memory}
    model = MemorizingTransformer(**settings)
    model.load_state_dict(weights)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    return model.eval()
