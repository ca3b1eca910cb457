"""The model with its tokenizer, as one thing to call, save and load outside the training world."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from ..data.sources.documents import first_line
from ..data.tokens.tokenizers import byte_tokenizer, load_tokenizer
from ..errors import ConfigError, UserError
from ..memory import MemoryBank, OpenSegment
from ..model import ModelConfig, ModelOutput, Transformer
from .arguments import MODEL_TYPE, SETTINGS, brief, check_settings, refuse_unknown

TOKENIZER_FOLDER = "tokenizer"

LOADING = ("revision", "cache_dir", "force_download", "token", "local_files_only", "strict",
           "map_location", "config")  # fmt: skip
"""Options of ``from_pretrained`` that are no settings of the model."""
NEEDLESS = ("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "max_shard_size",
            "token_type_ids")  # fmt: skip
"""What users of transformers may give, and what changes nothing here."""


def _device_of(device_map: Any) -> torch.device:
    """The one device of a ``device_map``."""
    device = device_map
    if isinstance(device, Mapping) and len({*device.values()}) == 1:
        device = next(iter(device.values()))
    if isinstance(device, str) and device in ("auto", "balanced", "sequential"):
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, TypeError, AssertionError) as error:
        remedy = f"must be auto, or one device that is there ({first_line(error)})"
        raise ConfigError("device_map", device_map, remedy) from error
    return place


def dtype_of(dtype: Any) -> torch.dtype | None:
    """A dtype by itself or by its name; None for that of the saved weights."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError("dtype", dtype, "must be auto or a floating type such as torch.bfloat16")
    return found


def _refuse_other_folders(name: str) -> None:
    """Say what a path is that ``save_pretrained`` did not write."""
    folder = Path(name)
    if not folder.exists() or (folder / "config.json").is_file():
        return
    if folder.is_file():
        remedy = "is a file; give the folder that save_pretrained wrote"
    elif (folder / "manifest.json").is_file():
        remedy = (
            "is a checkpoint of a training run; write a model of it with `python -m "
            f"memorizing_transformers export --ckpt_path {name} --out model`"
        )
    else:
        remedy = "holds no config.json; give a folder that save_pretrained wrote"
        if (folder / "memorized.json").is_file():
            remedy = "is of a pretrained model; read it with MemorizedModel.from_pretrained"
    raise ConfigError("from_pretrained", name, remedy)


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
        if settings.get("model_type") == MODEL_TYPE:  # config.json says it
            del settings["model_type"]
        check_settings(settings)
        config = ModelConfig(**settings)
        if config.vocab_size is None:
            config.vocab_size = len(byte_tokenizer())
        super().__init__(config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, or bytes; assign another to replace it."""
        return byte_tokenizer()

    def forward(
        self,
        input_ids: Tensor | Mapping[str, Any] | list[Any],
        memory: MemoryBank | None = None,
        attention_mask: Any = None,
        *,
        open_segment: OpenSegment | None = None,
        targets: Tensor | None = None,
        **others: Any,
    ) -> ModelOutput:
        """Read a segment, as ``Transformer.forward`` does.

        Args:
            input_ids: what ``self.tokenizer`` returned, token ids as nested lists, or a tensor; one
                sequence without a batch dimension gets one.
            memory: the bank of these rows, or None.
            attention_mask: 1 for tokens, 0 for padding, which must be at the right of a row. The
                mask changes nothing: no token sees what comes after it. Logits of padding mean
                nothing, and ``memory.commit`` takes the mask to leave it out.
            open_segment: of ``memory``; the tokens follow those that it holds, and are added to it.
            targets: as for ``Transformer.forward``.
            others: ``token_type_ids`` are ignored.

        Raises:
            ConfigError: naming the argument that cannot be used.
        """
        if "labels" in others:
            remedy = "take the loss yourself: model.loss(output.logits, targets)"
            raise ConfigError("labels", brief(others["labels"]), remedy)
        refuse_unknown(others, ["input_ids", "memory", "attention_mask", *NEEDLESS[-1:]])
        if isinstance(input_ids, Mapping):
            attention_mask = input_ids.get("attention_mask", attention_mask)
            input_ids = input_ids["input_ids"]
        ids = self._ids(input_ids)
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=ids.device).long()
            mask = mask[None] if mask.ndim == 1 else mask
            if mask.shape != ids.shape or (mask.diff() > 0).any():
                remedy = "must have the shape of input_ids, with padding at the right of a row only"
                raise ConfigError("attention_mask", brief(mask.tolist()), remedy)
        return super().forward(ids, memory, open_segment=open_segment, targets=targets)

    def _ids(self, given: Any) -> Tensor:
        """Token ids (B, N), of any form that ``forward`` takes."""
        try:
            ids = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            remedy = (
                "must be what model.tokenizer(text) returns, or token ids, all rows of one length "
                f"({first_line(error)})"
            )
            raise ConfigError("input_ids", brief(given), remedy) from error
        if not ids.numel():
            raise ConfigError("input_ids", brief(given), "holds no token; give at least one")
        if ids.is_floating_point() or ids.is_complex() or ids.ndim not in (1, 2):
            remedy = "must be integers of shape (N,) or (B, N)"
            raise ConfigError("input_ids", f"{ids.dtype} {tuple(ids.shape)}", remedy)
        # A look at ids that are on a GPU already would wait for it.
        if ids.device.type == "cpu":
            least, most = (int(bound) for bound in ids.aminmax())
            if least < 0 or most >= self.config.vocab_size:  # type: ignore[operator]
                wrong, end = least if least < 0 else most, self.config.vocab_size
                raise ConfigError("input_ids", wrong, f"each id must be at least 0 and below {end}")
        ids = ids.to(self.embedding.weight.device)
        return ids[None] if ids.ndim == 1 else ids

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        **options: Any,
    ) -> str | None:
        """Write the model as safetensors, its configuration and its tokenizer.

        Args:
            save_directory: the folder, made if missing; files of an earlier model are replaced.
            push_to_hub: upload it too.
            safe_serialization: only True, the one format there is.
            is_main_process: False writes nothing.
            options: of the upload (``repo_id``, ``commit_message``, ``private``, ``token``, ...);
                ``max_shard_size`` is ignored, the weights are one file.

        Returns:
            where it was uploaded, or None.

        Raises:
            ConfigError: naming the argument that cannot be used, or why nothing could be written.
        """
        upload = inspect.signature(super().push_to_hub).parameters
        refuse_unknown(options, [*upload, "repo_id", "max_shard_size"])
        options.pop("max_shard_size", None)
        if not safe_serialization:
            remedy = "must be True; weights are always written as safetensors"
            raise ConfigError("safe_serialization", safe_serialization, remedy)
        if not is_main_process:
            return None
        try:
            url: str | None = super().save_pretrained(
                save_directory, push_to_hub=push_to_hub, **options
            )
        except UserError:
            raise
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            what = "cannot be written; give a folder that can"
            if push_to_hub and Path(save_directory, "model.safetensors").is_file():
                what = "cannot be uploaded; the folder itself may be complete"
            remedy = f"{what} ({first_line(error)})"
            raise ConfigError("save_pretrained", str(save_directory), remedy) from error
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin would save only what the constructor was given: defaults may change one day.
        self._hub_mixin_config = {"model_type": MODEL_TYPE, **asdict(self.config)}
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
                (``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``);
                ``dtype`` (or ``torch_dtype``) and ``device_map`` for one device, as transformers
                has them; and ``strict=False`` to draw the weights that are not there.

        Raises:
            ConfigError: where nothing is there, what is there does not fit, or an argument is not
                known.
        """
        dtype = dtype_of(kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None))
        device_map = kwargs.pop("device_map", None)
        device = None if device_map is None else _device_of(device_map)
        for needless in NEEDLESS:
            kwargs.pop(needless, None)
        refuse_unknown(kwargs, [*SETTINGS, *LOADING, "dtype", "device_map"])
        check_settings({name: kwargs[name] for name in SETTINGS if name in kwargs})
        name = str(pretrained_model_name_or_path)
        _refuse_other_folders(name)
        try:
            # The hub's class prints that it loads a local folder.
            with redirect_stdout(StringIO()):
                model: MemorizingTransformer = super().from_pretrained(name, **kwargs)
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            # A name that is none, no network, a missing or broken file: each raises its own.
            what = "is no folder, and no model on the hub that can be reached"
            if Path(name).is_dir():
                what = "cannot be read"
            raise ConfigError("from_pretrained", name, f"{what} ({first_line(error)})") from error
        return model.to(device=device, dtype=dtype)

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
            what = "do not fit the settings" if "state_dict" in reason else "cannot be loaded"
            raise ConfigError(
                "from_pretrained", model_id, f"its weights {what} ({reason})"
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
