"""The model with its tokenizer, as one thing to call, save and load outside the training world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from .data.documents import first_line
from .data.tokenization import byte_tokenizer, load_tokenizer
from .errors import ConfigError
from .memory import MemoryBank
from .model import ModelConfig, ModelOutput, Transformer

TOKENIZER_FOLDER = "tokenizer"


class MemorizingTransformer(
    Transformer, PyTorchModelHubMixin, library_name="memorizing-transformers"
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
        # The mixin would save only what the constructor was given: defaults may change one day.
        self._hub_mixin_config = asdict(self.config)
        super()._save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory / TOKENIZER_FOLDER)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> MemorizingTransformer:
        """Load a folder or hub name that ``save_pretrained`` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            kwargs: settings that replace the saved ones: ``memory={"size": 65536}`` replaces one
                field of the memory, a ``MemoryConfig`` all of them. Also the options of the hub
                (``revision``, ``token``, ``cache_dir``, ...), and ``strict=False`` to start anew
                the weights that are not there.

        Raises:
            ConfigError: where nothing is there, or what is there does not fit.
        """
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            remedy = "holds no config.json; give a folder that save_pretrained wrote"
            raise ConfigError("from_pretrained", name, remedy)
        try:
            model: MemorizingTransformer = super().from_pretrained(name, **kwargs)
        except ConfigError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            # A name that is none, no network, a missing or broken file: each raises its own.
            what = "is no folder, and no model on the hub that can be reached"
            if folder.is_dir():
                what = "cannot be read"
            raise ConfigError("from_pretrained", name, f"{what} ({first_line(error)})") from error
        return model

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> MemorizingTransformer:
        if isinstance(kwargs.get("memory"), Mapping):
            kwargs["memory"] = {**(config or {}).get("memory", {}), **kwargs["memory"]}
        kwargs.setdefault("strict", True)
        try:
            model: MemorizingTransformer = super()._from_pretrained(model_id=model_id, **kwargs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                "from_pretrained", model_id, f"its weights do not fit the settings ({reason})"
            ) from error
        root = Path(model_id)
        if not root.is_dir():
            names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            options = {name: kwargs[name] for name in names}
            pattern = f"{TOKENIZER_FOLDER}/*"
            root = Path(snapshot_download(model_id, allow_patterns=pattern, **options))
        if (root / TOKENIZER_FOLDER).is_dir():
            model.tokenizer = load_tokenizer(str(root / TOKENIZER_FOLDER))
        return model
