"""Resuming a stopped run: what must be the same, and what each rank restores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from ...errors import UserError
from ...memory import MemoryBank
from ...model import MemorizingNet, ModelConfig
from ...model.renamed import as_today
from ...pretrained.memorized import MemorizedModel
from ...pretrained.saved import describe
from ..optimizers import OptimizerConfig
from ..sharded import is_sharded, like
from . import folder as checkpoints
from .export import BASE_KEY, SETTINGS_KEY, TOKENIZER_KEY, is_packed, pack_tokenizer
from .folder import FOLDER_KEY, DamagedCheckpoint, explain_damage
from .optimizer_state import SETTINGS_KEY as OPTIMIZER_KEY
from .rank_state import load_gradients, load_random_state, load_rows, rows_of

ARCHITECTURE_KEY = "architecture"
"""Where a checkpoint keeps what its weights mean."""

LAYERS = "memory.layers"

MAY_CHANGE = (
    "the number of ranks, memory.size, the optimiser's settings, max_steps, evaluation and logging "
    "may change"
)


def resume_facts(datamodule: Any) -> dict[str, Any]:
    """What decides which token a row reads at which step."""
    if datamodule is None:
        return {}
    return {
        "data.batch_rows": datamodule.batch_rows,
        "data.segment_length": datamodule.segment_length,
        "data.seed": datamodule.seed,
        "data.cut_tokens": datamodule.cut_tokens or 0,
        "data.shuffle_tokens": datamodule.shuffle_tokens or 0,
        "data": datamodule.store_folder.name,
    }


def describe_model(
    checkpoint: dict[str, Any],
    net: MemorizingNet,
    config: ModelConfig,
    optimizer: OptimizerConfig,
    tokenizer: Any,
) -> None:
    """Add to a checkpoint what is needed to use its weights again.

    Args:
        checkpoint: changed in place.
        net: the network.
        config: the model.
        optimizer: the optimiser and its schedule.
        tokenizer: that of the data, or None if it is not known.
    """
    checkpoint[ARCHITECTURE_KEY] = net.architecture()
    if isinstance(net, MemorizedModel):
        checkpoint[BASE_KEY] = describe(net)
    checkpoint[SETTINGS_KEY] = asdict(config)
    checkpoint[OPTIMIZER_KEY] = asdict(optimizer)
    if tokenizer is not None:
        checkpoint[TOKENIZER_KEY] = pack_tokenizer(tokenizer)


def check_weights(checkpoint: dict[str, Any], ours: dict[str, Any], tokenizer: Any) -> None:
    """Refuse the weights of another architecture, or for other token ids.

    Args:
        checkpoint: as loaded.
        ours: the architecture of the network.
        tokenizer: that of the data, or None where it is not known.

    Raises:
        UserError: naming every key that differs.
    """
    saved = checkpoint.get(ARCHITECTURE_KEY)
    if saved is None:
        raise UserError("ckpt_path: not a checkpoint of this project, no architecture in it")
    # A checkpoint of an earlier version lacks later settings; it did what their defaults do.
    defaults = {key: value for key, value in ModelConfig().architecture().items() if key in ours}
    saved = {**defaults, **saved}
    differing = [
        f"model.{key} = {ours.get(key)} (checkpoint: {saved.get(key)})"
        for key in sorted(set(saved) | set(ours))
        if saved.get(key) != ours.get(key)
    ]
    if differing:
        remedy = "give the config that was saved with its run"
        if saved.get(LAYERS) != ours.get(LAYERS):
            remedy += (
                "; a memory is switched off and on by model.memory.size 0 and another size, with "
                "the same layers, or begin a new run with the weights: model.init_from"
            )
        raise UserError(
            f"ckpt_path: the checkpoint is of another architecture: {', '.join(differing)}; "
            f"{remedy}"
        )
    files = checkpoint.get(TOKENIZER_KEY)
    if files is not None and tokenizer is not None and not is_packed(files, tokenizer):
        raise UserError(
            "data.tokenizer: not the checkpoint's tokenizer, so its ids mean other text; give "
            "the tokenizer/ folder that `python -m memorizing_transformers export` writes"
        )


def check_resumable(checkpoint: dict[str, Any], datamodule: Any) -> None:
    """Refuse to resume without an optimiser's state, or with another order of tokens.

    Raises:
        UserError: naming what differs and what may.
    """
    folder = checkpoint.get(FOLDER_KEY, {"path": "", "manifest": {}})
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"ckpt_path: {folder['path']} holds weights only, so training cannot resume from it; "
            "begin a new run with its weights: model.init_from instead of ckpt_path"
        )
    for key, ours in resume_facts(datamodule).items():
        saved = folder["manifest"].get(key)
        if saved is None or saved == ours:
            continue
        if key == "data":
            raise UserError(
                f"ckpt_path: the checkpoint was written on other data or another tokenizer (store "
                f"{saved}, now {ours}), so its position means nothing; give the same data.*"
            )
        raise UserError(
            f"{key} = {ours!r}: the checkpoint was written with {saved!r}, and rows and positions "
            f"would not fit; {MAY_CHANGE}"
        )


def restore_rank(
    origin: dict[str, Any],
    rank: int,
    world_size: int,
    net: MemorizingNet,
    device: torch.device | str | None = None,
) -> tuple[MemoryBank | None, bool]:
    """Put back what a rank owns: the memory of its rows, its gradients, its random states.

    Args:
        origin: ``path`` and ``manifest`` of the checkpoint, as ``FOLDER_KEY`` holds them.
        rank: this rank.
        world_size: ranks now.
        net: the network.
        device: where the bank lives.

    Returns:
        the bank of this rank's rows, or None where none had been read; whether there were
        gradients.

    Raises:
        UserError: where a part is damaged, or the rows cannot be split evenly.
    """
    folder, manifest = Path(origin["path"]), origin["manifest"]
    try:
        bank = restore_rows(
            folder, manifest, rank, world_size, lambda rows: net.new_memory(rows, device)
        )
        return bank, restore_gradients(folder, manifest, rank, world_size, net)
    except DamagedCheckpoint as error:
        raise explain_damage(folder, error) from error


def restore_rows(
    folder: Path,
    manifest: dict[str, Any],
    rank: int,
    world_size: int,
    new_memory: Callable[[int], MemoryBank],
) -> MemoryBank | None:
    """The memory of this rank's rows; on as many ranks, its random states are put back too.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        rank: this rank.
        world_size: ranks now.
        new_memory: makes an empty bank of so many rows.

    Returns:
        the bank, or None where no row had been read.

    Raises:
        DamagedCheckpoint: naming the part that is damaged.
        UserError: where the rows cannot be split evenly.
    """
    parts = int(manifest["world_size"])
    # Parts are as wide as each other: every rank owns the same number of rows.
    width = len(rows_of(folder, 0))
    if width * parts % world_size:
        raise UserError(
            f"trainer.devices: {world_size} ranks cannot share the checkpoint's {width * parts} "
            "rows evenly; give a number that divides them"
        )
    count = width * parts // world_size
    first_row = rank * count
    # A run that has read nothing has no rows, and then a part for each rank.
    needed = range(rank, rank + 1)
    if width:
        needed = range(first_row // width, -(-(first_row + count) // width))
    same_ranks = parts == world_size
    if width or same_ranks:
        checkpoints.verify(folder, [checkpoints.rank_file(part) for part in needed])
    bank = new_memory(count) if width else None
    rows = load_rows(folder, needed, first_row, count) if width else {}
    if bank is not None and rows:
        bank.load(rows)
    if bank is not None and bank.memories and not any(name.startswith("memory.") for name in rows):
        rank_zero_info("The checkpoint holds no memory: every row resumes with an empty one.")
    if same_ranks:
        load_random_state(folder, rank)
    else:
        rank_zero_info(
            f"Written by {parts} ranks, read by {world_size}: each row has found its rank; random "
            "states (dropout) begin afresh."
        )
    return bank


def restore_gradients(
    folder: Path, manifest: dict[str, Any], rank: int, world_size: int, net: MemorizingNet
) -> bool:
    """Put back what was accumulated towards the next optimiser step.

    The same number of ranks take their own; another number of ranks take the mean.

    Returns:
        whether there was anything.

    Raises:
        DamagedCheckpoint: naming the part that is damaged.
    """
    parts = int(manifest["world_size"])
    if not load_gradients(folder, [0]):
        return False
    own = parts == world_size and not is_sharded(net)
    wanted = [rank] if own else [*range(parts)]
    checkpoints.verify(folder, [checkpoints.rank_file(part) for part in wanted])
    gradients = as_today(load_gradients(folder, wanted) or load_gradients(folder, [0]))
    for name, parameter in net.named_parameters():
        if name in gradients and parameter.requires_grad:
            parameter.grad = like(gradients[name], parameter)
    return True
