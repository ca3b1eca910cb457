"""A model to use, of whatever folder holds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...data.sources.documents import first_line
from ...data.tokens.tokenizers import load_tokenizer
from ...errors import ConfigError
from ...generation.causal_lm import MemorizingForCausalLM
from ...generation.session import UNKNOWN_LENGTH
from ...pretrained.adapt import load_base
from ...pretrained.arguments import MODEL_TYPE, check_window
from ...pretrained.hub import MemorizingTransformer
from ...pretrained.induction import induction_layers
from ...pretrained.memorize import memorize
from ...pretrained.memorized import MemorizedModel
from .export import load_model
from .folder import read_manifest

FOR_PRETRAINED = {"segment_length": 1024, "size": 65536}
"""What a pretrained model gets that was never given a memory before."""

AnyModel = MemorizingTransformer | MemorizedModel


def open_model(ckpt_path: str, key: str = "ckpt_path") -> tuple[AnyModel, dict[str, Any]]:
    """The model of a checkpoint or of a folder of ``save_pretrained``, and what its manifest says.

    Raises:
        UserError: where it is neither, or reaches no memory.
    """
    folder = Path(ckpt_path)
    manifest: dict[str, Any] = {}
    model: AnyModel
    if (folder / "memorized.json").is_file():
        model = MemorizedModel.from_pretrained(folder)
    elif (folder / "config.json").is_file():
        try:
            model = MemorizingTransformer.from_pretrained(folder).eval()
        except ConfigError as error:
            remedy = f"its config.json does not fit this model ({error})"
            raise ConfigError(key, ckpt_path, remedy) from error
    else:
        model, manifest = load_model(folder), read_manifest(folder)
    if not model.config.memory_layers:
        remedy = "its model has no memory layer, so nothing is retrieved; give one trained with one"
        raise ConfigError(key, ckpt_path, remedy)
    return model, manifest


def choose_segment(segment_length: int | None, manifest: dict[str, Any], xl_cache: int) -> int:
    """The segment length given, or else the run's, or else that of the XL cache.

    Raises:
        ConfigError: where there is none, or it is not positive.
    """
    segment = segment_length or manifest.get("data.segment_length") or xl_cache
    if segment_length is not None and segment_length < 1:
        raise ConfigError("segment_length", segment_length, "must be at least 1")
    if not segment:
        remedy = "such a folder does not say it; give the training run's data.segment_length"
        raise ConfigError("segment_length", segment_length, remedy)
    return int(segment)


def place(model: AnyModel, device: str | None) -> None:
    """Move a model to where it computes.

    Args:
        model: moved in place.
        device: None for a GPU where there is one.

    Raises:
        ConfigError: where the device cannot compute.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # A device may take weights and compute nothing, as meta does.
        torch.zeros(1, device=where).item()
        model.to(where)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", device, f"{first_line(error)}; give cpu") from error


def open_for_use(
    name: str, segment_length: int | None, memory_size: int | None
) -> tuple[AnyModel, int]:
    """A model that reads and generates, and the tokens of its segments.

    Args:
        name: a checkpoint, a folder of ``save_pretrained``, or the folder or hub name of a model of
            transformers, which then gets a memory.
        segment_length: None for the model's own.
        memory_size: slots of each memory; None for the model's own.

    Raises:
        ConfigError: where there is no such model, or a size cannot work.
    """
    if memory_size is not None and memory_size < 0:
        raise ConfigError("memory_size", memory_size, "must be at least 0; 0 = no memory")
    folder, sizes = Path(name), {}
    if memory_size is not None:
        sizes = {"memory": {"size": memory_size}}
    manifest: dict[str, Any] = {}
    model: AnyModel
    if (folder / "manifest.json").is_file():
        model, manifest = load_model(folder, **sizes), read_manifest(folder)
    elif (folder / "memorized.json").is_file():
        model = MemorizedModel.from_pretrained(folder, **sizes)
    elif folder.exists() and not (folder / "config.json").is_file():
        remedy = "holds no model; give a checkpoint, a folder of export, or a model of transformers"
        raise ConfigError("model", name, remedy)
    elif folder.is_dir() and not is_of_transformers(folder):
        model = MemorizingTransformer.from_pretrained(folder, **sizes).eval()
    else:
        base = load_base(name, "model")
        if isinstance(base, MemorizingForCausalLM):  # of the hub, by its name
            model = MemorizingTransformer.from_pretrained(name, **sizes)
            return model, choose_segment(segment_length, {}, base.config.segment_length)
        window = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**31
        length = min(FOR_PRETRAINED["segment_length"], window)
        length = choose_segment(segment_length, {}, length)
        check_window(length, window, "")
        layers = induction_layers(base, show=False)
        size = FOR_PRETRAINED["size"] if memory_size is None else memory_size
        memory = {"size": size, "search": "bucketed"}
        model = memorize(base, memory, layers, xl_cache=length).eval()
        model.tokenizer = load_tokenizer(name)
        return model, length
    window = getattr(model, "window", 2**31)
    known = model.config.xl_cache or min(UNKNOWN_LENGTH, window)
    length = choose_segment(segment_length, manifest, known)
    check_window(length, window, "")
    return model, length


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers."""
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return settings.get("model_type", MODEL_TYPE) != MODEL_TYPE
