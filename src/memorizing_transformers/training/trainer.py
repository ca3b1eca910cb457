"""A Trainer whose checkpoints hold every row's memory, and are whole or absent."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from ..errors import ConfigError
from . import checkpoints
from .rank_state import save_rank
from .resume import resume_facts


class FolderCheckpointIO(TorchCheckpointIO):
    """Reads and removes checkpoint folders; what it writes is the trainer's part of one."""

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The trainer's part, verified, on the CPU; no code of the file is executed.

        Raises:
            UserError: where the checkpoint is damaged or none of ours.
        """
        folder = Path(path)
        if not folder.is_dir():
            remedy = "not a checkpoint of this project, which are folders with a manifest.json"
            raise ConfigError("ckpt_path", str(path), remedy)
        try:
            manifest = checkpoints.verify(folder, [checkpoints.TRAINER_FILE])
        except checkpoints.DamagedCheckpoint as error:
            raise checkpoints.explain_damage(folder, error) from error
        file = folder / checkpoints.TRAINER_FILE
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint[checkpoints.FOLDER_KEY] = {"path": str(folder), "manifest": manifest}
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove every part, the manifest first."""
        checkpoints.remove(Path(path))


class RunStart(Callback):
    """Names each start of a run and clears away what a dead one left half-written."""

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Rank 0 cleans up before anybody saves."""
        if trainer.is_global_zero:
            for callback in trainer.checkpoint_callbacks:
                folder = getattr(callback, "dirpath", None)
                if folder and Path(folder).is_dir():
                    checkpoints.clean_leftovers(Path(folder))
        trainer.name_run()


class MemoryTrainer(Trainer):
    """A Trainer that saves folders: its own part on rank 0, one part more from every rank.

    Args:
        args: as for ``Trainer``.
        kwargs: as for ``Trainer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strategy.checkpoint_io = FolderCheckpointIO()
        self._run_name = ""
        self.callbacks: list[Callback]
        self.callbacks.append(RunStart())

    def name_run(self) -> None:
        """Draw a name for this start of the run, alike on all ranks (a collective)."""
        self._run_name = self.strategy.broadcast(secrets.token_hex(4))

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint folder.

        Every rank writes its part into a staging folder, and rank 0 gives the whole its name. Ranks
        meet through files, so a rank that is alone gets an error and no hang.

        Args:
            filepath: the folder to write.
            weights_only: leave out optimiser, position and memory.
            storage_options: unused.
        """
        module: Any = self.lightning_module
        target = Path(filepath)
        staging = checkpoints.staging_folder(target, self._run_name, self.global_step)
        staging.mkdir(parents=True, exist_ok=True)
        checkpoint = self._checkpoint_connector.dump_checkpoint(bool(weights_only))
        bank = module.banks.get("train")
        keep = module.save_memory and not weights_only
        files = [save_rank(staging, self.global_rank, bank, keep)]
        self.strategy.save_checkpoint(checkpoint, staging / checkpoints.TRAINER_FILE)
        if self.is_global_zero:
            files.append(staging / checkpoints.TRAINER_FILE)
        checkpoints.mark_done(staging, self.global_rank, files)
        if self.is_global_zero:
            info = {
                "step": self.global_step,
                "memory": bank is not None and keep,
                "weights_only": bool(weights_only),
                **resume_facts(getattr(self, "datamodule", None)),
            }
            checkpoints.finish(staging, target, self.world_size, info)
