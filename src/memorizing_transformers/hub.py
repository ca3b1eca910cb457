"""The model with its tokenizer, as one thing to call, save and load outside the training world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from .data.tokenization import byte_tokenizer, load_tokenizer
from .memory import MemoryBank
from .model import MemoryConfig, ModelConfig, ModelOutput, Transformer

TOKENIZER_FOLDER = "tokenizer"


class MemorizingTransformer(
    Transformer,
    PyTorchModelHubMixin,
    library_name="memorizing-transformers",
    coders={MemoryConfig: (asdict, lambda data: MemoryConfig(**data))},
):
    """A ``Transformer`` that also knows its tokenizer.

    ``save_pretrained(folder)`` writes safetensors, the configuration and the tokenizer;
    ``MemorizingTransformer.from_pretrained(folder)`` reads them back.

    Args:
        settings: the fields of ``ModelConfig``; without ``vocab_size`` the model fits bytes.
    """

    def __init__(self, **settings: Any) -> None:
        config = ModelConfig(**settings)
        if config.vocab_size is None:
            config.vocab_size = len(byte_tokenizer())
        super().__init__(config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, or bytes; assign another to replace it."""
        return byte_tokenizer()

    def forward(
        self, input_ids: Tensor | Mapping[str, Any] | list[Any], memory: MemoryBank | None = None
    ) -> ModelOutput:
        """Read a segment, as ``Transformer.forward`` does.

        Args:
            input_ids: what ``self.tokenizer`` returned, token ids as nested lists, or a tensor; one
                sequence without a batch dimension gets one.
            memory: the bank of these rows, or None.
        """
        ids = input_ids["input_ids"] if isinstance(input_ids, Mapping) else input_ids
        ids = torch.as_tensor(ids, device=self.embedding.weight.device)
        return super().forward(ids[None] if ids.ndim == 1 else ids, memory)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory / TOKENIZER_FOLDER)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MemorizingTransformer:
        """Load a folder or hub name that ``save_pretrained`` wrote.

        Settings given by name replace the saved ones, e.g. a ``memory`` of another size.
        """
        model: MemorizingTransformer = super().from_pretrained(*args, **kwargs)
        return model

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> MemorizingTransformer:
        model: MemorizingTransformer = super()._from_pretrained(model_id=model_id, **kwargs)
        folder = Path(model_id) / TOKENIZER_FOLDER
        if folder.is_dir():
            model.tokenizer = load_tokenizer(str(folder))
        return model
