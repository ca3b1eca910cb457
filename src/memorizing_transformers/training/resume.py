"""Going on where a run stopped: what must be the same, and what each rank puts back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ..errors import UserError
from ..memory import MemoryBank
from ..model import ModelConfig
from . import checkpoints
from .checkpoints import FOLDER_KEY
from .export import TOKENIZER_KEY, is_packed
from .rank_state import load_random_state, load_rows

ARCHITECTURE_KEY = "architecture"
"""Where a checkpoint keeps what its weights mean."""

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


def check_weights(checkpoint: dict[str, Any], config: ModelConfig, tokenizer: Any) -> None:
    """Refuse the weights of another architecture, or for other token ids.

    Args:
        checkpoint: as loaded.
        config: the model.
        tokenizer: that of the data, or None where it is not known.

    Raises:
        UserError: naming every key that differs.
    """
    saved, ours = checkpoint.get(ARCHITECTURE_KEY), config.architecture()
    if saved is None:
        raise UserError("ckpt_path: not a checkpoint of this project, no architecture in it")
    differing = [
        f"model.{key} = {ours.get(key)} (checkpoint: {saved.get(key)})"
        for key in sorted(set(saved) | set(ours))
        if saved.get(key) != ours.get(key)
    ]
    if differing:
        raise UserError(
            f"ckpt_path: the checkpoint is of another architecture: {', '.join(differing)}; "
            "give the config that was saved with its run"
        )
    files = checkpoint.get(TOKENIZER_KEY)
    if files is not None and tokenizer is not None and not is_packed(files, tokenizer):
        raise UserError(
            "data.tokenizer: not the checkpoint's tokenizer, so its ids mean other text; give "
            "the tokenizer/ folder that `python -m memorizing_transformers export` writes"
        )


def check_resumable(checkpoint: dict[str, Any], datamodule: Any) -> None:
    """Refuse to go on without an optimiser's state, or with another order of tokens.

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
    folder: Path, manifest: dict[str, Any], rank: int, world_size: int, bank: MemoryBank
) -> None:
    """Put back the memory of this rank's rows and, on as many ranks, its random states.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        rank: this rank.
        world_size: ranks now.
        bank: this rank's training bank, to be filled.

    Raises:
        DamagedCheckpoint: naming the part that is damaged.
    """
    parts = int(manifest["world_size"])
    first_row = rank * bank.batch_size
    same_ranks = parts == world_size
    # Parts are as wide as each other: every rank owns the same number of rows.
    width = bank.batch_size * world_size // parts
    needed = range(first_row // width, -(-(first_row + bank.batch_size) // width))
    checkpoints.verify(folder, [checkpoints.rank_file(part) for part in needed])
    if manifest["memory"]:
        bank.load(load_rows(folder, needed, first_row, bank.batch_size))
    else:
        rank_zero_info("The checkpoint holds no memory: every row goes on with an empty one.")
    if same_ranks:
        load_random_state(folder, rank)
    else:
        rank_zero_info(
            f"Written by {parts} ranks, read by {world_size}: each row has found its rank; random "
            "states (dropout) start anew."
        )
