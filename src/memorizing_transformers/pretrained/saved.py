"""A memorized model on disk: what was trained, and which base it belongs to.

The folder holds ``memorized.json``, ``memory.safetensors`` and the tokenizer; the base stays where
it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.sources.documents import first_line
from ..data.tokens.tokenizers import load_tokenizer
from ..errors import ConfigError
from ..model import MemoryConfig
from .adapt import AdaptConfig, AdaptedConfig, AdaptedModel, load_base
from .arguments import check_memory, refuse_unknown
from .hub import TOKENIZER_FOLDER, dtype_of
from .keys import fingerprint_weights
from .memorized import MemorizedModel

SETTINGS = "memorized.json"
WEIGHTS = "memory.safetensors"


def describe(model: MemorizedModel) -> dict[str, Any]:
    """What is needed, with the base and the trained weights, to make the model again."""
    adapt = model.adapt if isinstance(model, AdaptedModel) else None
    adapt = adapt or AdaptConfig(position=model.position, skip_first=model.skip_first)
    memory = {**asdict(model.memory_config), "layers": list(model.memory_layers)}
    return {
        "base": model.base_name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.base_dtype).removeprefix("torch."),
        "xl_cache": model.xl_cache,
        "memory": memory,
        "adapt": asdict(adapt),
    }


def build(settings: dict[str, Any], base: Any = None, **overrides: Any) -> AdaptedModel:
    """The model that ``describe`` described, its trained weights still as at the start.

    Args:
        settings: as ``describe`` gave them.
        base: the pretrained model, its folder or hub name; None for the one that is named.
        overrides: ``xl_cache``, ``dtype`` of the base, and of ``memory`` the run-time settings
            that differ.

    Raises:
        ConfigError: where the base is missing, or has other weights.
    """
    check_memory(overrides.get("memory"))
    refuse_unknown(overrides, ["base", "xl_cache", "memory", "dtype"])
    name = settings["base"] if base is None else base
    # Weights in another dtype have another fingerprint.
    own = dtype_of(settings.get("dtype")) or torch.float32
    loaded = load_base(str(name), "base", own) if isinstance(name, str | Path) else name
    memory = {**settings["memory"], **(overrides.pop("memory", None) or {})}
    xl_cache = overrides.pop("xl_cache", settings["xl_cache"])
    config = AdaptedConfig(xl_cache=xl_cache, memory=MemoryConfig(**memory))
    model = AdaptedModel(loaded, config, AdaptConfig(**settings["adapt"]))
    wanted = dtype_of(overrides.get("dtype"))
    if model.fingerprint != settings["fingerprint"]:
        remedy = (
            f"has other weights ({model.fingerprint}) than the base of this memory "
            f"({settings['fingerprint']}, {settings['base']}); give that one"
        )
        raise ConfigError("base", str(getattr(loaded, "name_or_path", name)), remedy)
    if wanted is not None:
        _cast(model, wanted)
    return model.eval()


def _cast(model: MemorizedModel, dtype: torch.dtype) -> None:
    """Give the base's parameters another dtype; rotary frequencies and the memory stay in fp32."""
    for name, parameter in model.base.named_parameters():
        if ".memory_reader." not in name:
            parameter.data = parameter.data.to(dtype)
    model.base_dtype = dtype
    model.fingerprint = _fingerprint(model)


def _fingerprint(model: MemorizedModel) -> str:
    """Of the base's own weights, as they are now."""
    own = {n: x for n, x in model.base.state_dict().items() if ".memory_reader." not in n}
    return fingerprint_weights(own)


def save_memorized(model: MemorizedModel, folder: str | Path) -> None:
    """Write a memorized model without its base.

    Args:
        model: of ``memorize``, of which the memory's own weights are saved, or of a training run,
            of which all trained ones are.
        folder: made if missing.

    Raises:
        ConfigError: where nothing can be written there, or the base was trained, which ``memorize``
            does not follow.
    """
    path = Path(folder)
    state = model.state_dict()
    if not isinstance(model, AdaptedModel):
        _refuse_trained(model)
        state = {name: tensor for name, tensor in state.items() if ".memory_reader." in name}
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / WEIGHTS)
        (path / SETTINGS).write_text(json.dumps(describe(model), indent=2) + "\n", "utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(path / TOKENIZER_FOLDER)
    except (OSError, SafetensorError) as error:
        remedy = f"cannot be written; give a folder that can ({first_line(error)})"
        raise ConfigError("save_pretrained", str(folder), remedy) from error


def _refuse_trained(model: MemorizedModel) -> None:
    """Refuse to leave out weights that no other place holds."""
    if _fingerprint(model) != model.fingerprint:
        remedy = (
            "has other weights than when it got its memory, and they are not saved with it; write "
            "them with base.save_pretrained, and memorize what is loaded from there"
        )
        raise ConfigError("base", model.base_name or type(model.base).__name__, remedy)


def load_memorized(folder: str | Path, base: Any = None, **overrides: Any) -> AdaptedModel:
    """A model that ``save_memorized`` or the command ``export`` wrote, in evaluation mode.

    Args:
        folder: where it was written.
        base: the pretrained model, its folder or hub name. Default: the one it was trained with.
        overrides: ``xl_cache``, ``dtype`` of the base (default: as it was), and of ``memory`` the
            run-time settings that differ.

    Raises:
        ConfigError: where the folder or the base cannot be read, or the base is another one.
    """
    path = Path(folder)
    try:
        settings = json.loads((path / SETTINGS).read_text("utf-8"))
        weights = load_file(path / WEIGHTS)
        if not isinstance(settings, dict):
            raise ValueError(f"{SETTINGS} holds no settings")
        missing = {"base", "fingerprint", "xl_cache", "memory", "adapt"} - {*settings}
        if missing:
            raise ValueError(f"{SETTINGS} lacks {', '.join(sorted(missing))}")
        if not isinstance(settings["memory"], dict) or not isinstance(settings["adapt"], dict):
            raise ValueError(f"memory and adapt of {SETTINGS} must be settings")
        check_memory(settings["memory"])
        refuse_unknown(settings["adapt"], [f.name for f in fields(AdaptConfig)], "adapt.")
    except (OSError, ValueError, SafetensorError) as error:
        remedy = f"is no folder of a memorized model ({first_line(error)})"
        raise ConfigError("folder", str(folder), remedy) from error
    model = build(settings, base, **overrides)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        remedy = f"its weights do not fit ({' '.join(str(error).split())})"
        raise ConfigError("folder", str(folder), remedy) from error
    if (path / TOKENIZER_FOLDER).is_dir():
        model.tokenizer = load_tokenizer(str(path / TOKENIZER_FOLDER))
    return model
