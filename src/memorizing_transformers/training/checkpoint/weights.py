"""Weights of a finished model as the start of another run: model.init_from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...data.sources.documents import first_line
from ...data.tokens.tokenizers import fingerprint_tokenizer, load_tokenizer
from ...errors import ConfigError
from ...model import MemorizingNet, ModelConfig
from ...model.renamed import as_today
from ...pretrained.hub import TOKENIZER_FOLDER
from . import folder as checkpoints
from .export import SETTINGS_KEY, TOKENIZER_KEY, unpack_tokenizer

KEY = "model.init_from"
SHOWN = 3
"""Names of weights in one line."""

OF_MEMORY = (
    "memory.combine",
    "memory.position_bias",
    "memory.bias_buckets",
    "memory.bias_max_distance",
    "memory.temperature",
    "memory.match_length",
    "memory.copy",
)
"""What the parameters of a memory layer depend on, in addition to its number."""


class Weights(NamedTuple):
    """A model's weights and what they mean."""

    tensors: dict[str, Tensor]
    """By their names in a ``Transformer``, on the CPU."""
    config: ModelConfig
    tokenizer: Any
    """None where none was saved."""


def _of_checkpoint(folder: Path) -> Weights:
    checkpoint = checkpoints.open_checkpoint(folder)
    named = checkpoint["state_dict"].items()
    tensors = {k.removeprefix("net."): value for k, value in named if k.startswith("net.")}
    tensors = as_today(tensors)
    packed = checkpoint.get(TOKENIZER_KEY)
    tokenizer = None if packed is None else unpack_tokenizer(packed)
    return Weights(tensors, ModelConfig(**checkpoint[SETTINGS_KEY]), tokenizer)


def _of_export(folder: Path) -> Weights:
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings.pop("model_type", None)
    tokenizer = None
    if (folder / TOKENIZER_FOLDER).is_dir():
        tokenizer = load_tokenizer(str(folder / TOKENIZER_FOLDER))
    tensors = as_today(load_file(folder / "model.safetensors"))
    return Weights(tensors, ModelConfig(**settings), tokenizer)


def read_weights(folder: str | Path) -> Weights:
    """The weights of a checkpoint folder, or of a folder that ``save_pretrained`` wrote.

    Raises:
        ConfigError: where nothing of that kind is there, or it cannot be read.
    """
    path = Path(folder)
    is_export = (path / "config.json").is_file()
    if not is_export and not (path / checkpoints.MANIFEST).is_file():
        remedy = (
            "is no checkpoint and no exported model; give a folder with manifest.json, as training "
            "saves it, or with config.json, as export and save_pretrained do"
        )
        raise ConfigError(KEY, str(folder), remedy)
    try:
        return _of_export(path) if is_export else _of_checkpoint(path)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(KEY, str(folder), f"cannot be read ({first_line(error)})") from error


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def of_another_architecture(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings outside the memory on which what weights mean depends and that differ.

    Args:
        saved: the architecture that the weights had; a setting that came later had its default.
        ours: that of the network that is to have them.

    Returns:
        of each, its key and both values.
    """
    defaults = {key: value for key, value in ModelConfig().architecture().items() if key in ours}
    saved = {**defaults, **saved}
    return [
        f"model.{key} = {ours.get(key)!r} (there: {saved.get(key)!r})"
        for key in {**ours, **saved}
        if not key.startswith("memory.") and saved.get(key) != ours.get(key)
    ]


def _refuse(folder: str, differing: list[str]) -> None:
    if differing:
        remedy = f"another architecture: {'; '.join(differing)}; set these as its run did"
        raise ConfigError(KEY, folder, remedy)


def weights_for(net: MemorizingNet, folder: str, tokenizer: Any = None) -> dict[str, Tensor]:
    """The weights of a finished model that a network can start with; says what they leave open.

    The memory may differ in every setting. Its parameters are taken over where the model was
    trained with a memory that is joined in the same way in the same layer; elsewhere they keep
    their start.

    Args:
        net: the network, sharded or not.
        folder: a checkpoint, or a folder that ``save_pretrained`` wrote.
        tokenizer: that of the data, or None where it is not known.

    Returns:
        by name in the network, on the CPU.

    Raises:
        ConfigError: naming the settings that differ, or because the token ids mean other text.
    """
    weights = read_weights(folder)
    saved, ours = weights.config.architecture(), net.architecture()
    # A network of another class may know fewer settings.
    known_here = {key: value for key, value in saved.items() if key in ours}
    _refuse(folder, of_another_architecture(known_here, ours))
    known = weights.tokenizer is not None and tokenizer is not None
    if known and fingerprint_tokenizer(weights.tokenizer) != fingerprint_tokenizer(tokenizer):
        remedy = (
            "has another tokenizer than data.tokenizer, so its ids mean other text; give "
            "data.tokenizer the tokenizer/ folder that `python -m memorizing_transformers export` "
            "writes"
        )
        raise ConfigError(KEY, folder, remedy)
    own, given = net.state_dict(), weights.tensors
    of_memory = {id(parameter) for parameter in net.memory_parameters()}
    replaced = {name for name, p in net.named_parameters() if id(p) in of_memory}
    if not weights.config.memory.size:
        # Never trained there: as good as not there.
        given = {name: tensor for name, tensor in given.items() if name not in replaced}
    lacking = [name for name in own if name not in given and name not in replaced]
    if lacking:
        raise ConfigError(KEY, folder, f"lacks weights of this model: {_some(lacking)}")
    if all(saved.get(key) == ours.get(key) for key in OF_MEMORY):
        replaced -= given.keys()
    taken = {name: given[name] for name in own if name in given and name not in replaced}
    _refuse(
        folder,
        [
            f"{name} is {[*own[name].shape]} (there: {[*tensor.shape]})"
            for name, tensor in taken.items()
            if tensor.shape != own[name].shape
        ][:SHOWN],
    )
    new = [name for name in own if name not in taken]
    left = [name for name in given if name not in taken]
    rank_zero_info(f"{KEY}: {len(taken)} of {len(own)} weights are those of {folder}")
    for names, what in ((new, "start as in a new model"), (left, "of that model are not used")):
        if names:
            rank_zero_info(f"{KEY}: {len(names)} weights {what}: {_some(names)}")
    return taken
