"""Which weights of another variant a network takes over, and which it cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from memorizing_transformers.errors import UserError
from memorizing_transformers.model import MemorizingNet, ModelConfig
from memorizing_transformers.model.renamed import as_today
from memorizing_transformers.training.checkpoint.export import TOKENIZER_KEY, is_packed
from memorizing_transformers.training.checkpoint.folder import open_checkpoint
from memorizing_transformers.training.checkpoint.resume import ARCHITECTURE_KEY
from memorizing_transformers.training.checkpoint.weights import of_another_architecture
from memorizing_transformers.training.optimizers import is_of_memory

PART_OF_READER = {
    "combine": "gate",
    "position_bias": "bias",
    "bias_buckets": "bias",
    "bias_max_distance": "bias",
    "match_length": "match",
}
"""By setting of the memory, the part of a reader whose weights mean something else under another
value, though names and shapes may be the same."""
ONLY_WITH = {"bias_buckets": ("t5", "learned-absolute"), "bias_max_distance": ("t5",)}
"""By setting, the position biases that it changes."""


def _of_another_meaning(
    names: Iterable[str], saved: dict[str, Any], ours: dict[str, Any]
) -> dict[str, list[str]]:
    """By setting that differs, the names of the weights that it gives another meaning.

    Args:
        names: of weights.
        saved: the architecture that they had; a setting that came later had its default.
        ours: the architecture of the network.
    """
    saved = {**ModelConfig().architecture(), **saved}
    found = {}
    for setting, part in PART_OF_READER.items():
        key = f"memory.{setting}"
        kind = ours.get("memory.position_bias")
        changes = kind in ONLY_WITH.get(setting, (kind,)) and saved[key] != ours.get(key)
        belongs = re.compile(rf"\.(memory_)?reader\.{part}\.")
        of_part = [name for name in names if changes and belongs.search(name)]
        if of_part:
            found[f"model.{key} = {ours.get(key)!r} (there: {saved[key]!r})"] = of_part
    return found


def matching(
    net: MemorizingNet,
    saved: Mapping[str, Tensor],
    architecture: dict[str, Any],
    fresh_memory: bool,
) -> dict[str, Tensor]:
    """The weights that a network takes over; it may differ in its memory layers.

    Gates, biases of retrieved pairs and parts of a copy head that the network lacks are left out.

    Args:
        net: the network.
        saved: weights by name; only names and shapes are looked at.
        architecture: of the network that had them; outside the memory it must be the same.
        fresh_memory: whether the memory's parameters that ``saved`` lacks, or that mean something
            else there, may keep their start.

    Raises:
        UserError: naming the weights that do not fit or the settings that give them another
            meaning.
    """
    own, ours = net.state_dict(), net.architecture()
    differing = of_another_architecture(architecture, ours)
    if differing:
        remedy = "another architecture; set these as there, or let the variant train from the start"
        raise UserError(f"from: {'; '.join(differing)}: {remedy}")
    named = [name for name in own if name in saved]
    other = _of_another_meaning(named, architecture, ours)
    if other and not fresh_memory:
        remedy = "weights of the memory mean something else; let the variant train"
        raise UserError(f"from: {'; '.join(other)}: {remedy}")
    dropped = {name for names in other.values() for name in names}
    taken = {name: tensor for name, tensor in saved.items() if name not in dropped}
    kept = {id(parameter) for parameter in net.memory_parameters()} if fresh_memory else set()
    excused = {name for name, parameter in net.named_parameters() if id(parameter) in kept}
    surplus = [n for n in taken if n not in own and not is_of_memory(n)]
    lacking = [name for name in own if name not in taken and name not in excused]
    misfit = [n for n in own if n in taken and taken[n].shape != own[n].shape]
    for what, names in (
        ("lacks", lacking),
        ("also has", surplus),
        ("has another shape of", misfit),
    ):
        if names:
            remedy = "let the variant train from the start"
            raise UserError(f"from: the checkpoint {what} {', '.join(names[:3])}; {remedy}")
    return taken


def load_weights(
    net: MemorizingNet, folder: Path, fresh_memory: bool, tokenizer: Any = None
) -> None:
    """Put a checkpoint's weights into a network, as ``matching`` chooses them.

    Args:
        net: the network.
        folder: the checkpoint.
        fresh_memory: as in ``matching``.
        tokenizer: that of the data; None not to compare it with the checkpoint's.

    Raises:
        UserError: as ``matching``, or because the token ids mean other text.
    """
    checkpoint = open_checkpoint(folder)
    packed = checkpoint.get(TOKENIZER_KEY)
    if packed is not None and tokenizer is not None and not is_packed(packed, tokenizer):
        raise UserError("from: the checkpoint has another tokenizer, so its ids mean other text")
    weights = checkpoint["state_dict"]
    saved = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
    architecture = checkpoint.get(ARCHITECTURE_KEY, {})
    taken = matching(net, as_today(saved), architecture, fresh_memory)
    net.load_state_dict(taken, strict=False)
