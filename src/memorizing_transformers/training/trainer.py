"""A Trainer whose checkpoints hold every row's memory, and are whole or absent."""

from __future__ import annotations

import secrets
import weakref
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from ..errors import ConfigError, UserError
from ..memory import MemoryBank
from . import checkpoints
from .background import Writer
from .liveness import Liveness
from .rank_state import RankPart
from .resume import resume_facts


class FolderCheckpointIO(TorchCheckpointIO):
    """Reads and removes checkpoint folders; what it writes is the trainer's part of one.

    Args:
        writer: what writes them; reading waits for it, removing queues behind it.
    """

    def __init__(self, writer: Writer | None = None) -> None:
        super().__init__()
        self.writer = writer or Writer(background=False)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The trainer's part, verified, on the CPU; no code of the file is executed.

        Raises:
            UserError: where the checkpoint is damaged or none of ours.
        """
        self.writer.wait()
        folder = Path(path)
        manifest = checkpoints.open_folder(folder)
        file = folder / checkpoints.TRAINER_FILE
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint[checkpoints.FOLDER_KEY] = {"path": str(folder), "manifest": manifest}
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove every part, the manifest first, once what was to be written before is whole."""
        self.writer.submit(lambda: checkpoints.remove(Path(path)))

    def teardown(self) -> None:
        """Wait until all is written."""
        self.writer.wait()


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class RunBounds(Checkpoint):
    """The start and the end of a run: names it, clears away what a dead one left, saves the end.

    A ``Checkpoint``, so that it comes after the trainer's other ones.
    """

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Rank 0 cleans up before anybody saves."""
        if trainer.is_global_zero:
            for callback in trainer.checkpoint_callbacks:
                folder = getattr(callback, "dirpath", None)
                if folder and Path(folder).is_dir():
                    checkpoints.clean_leftovers(Path(folder))
        trainer.name_run()

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last step, so that a finished run can go on whatever was saved before."""
        here = trainer.global_step
        if here != trainer.max_steps or here == trainer.saved_step or trainer.fast_dev_run:
            return
        folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        if folders[0]:
            trainer.save_checkpoint(Path(folders[0]) / "last.ckpt")


class MemoryTrainer(Trainer):
    """A Trainer that saves folders: its own part on rank 0, one part more from every rank.

    Args:
        args: as for ``Trainer``.
        background_save: copy the state and write it while training goes on; at most one copy is
            held. False waits for the disk.
        rank_timeout: seconds that a rank may be silent before the others end the run.
        kwargs: as for ``Trainer``.
    """

    def __init__(
        self,
        *args: Any,
        background_save: bool = True,
        rank_timeout: float = 45.0,
        **kwargs: Any,
    ) -> None:
        if rank_timeout <= 0:
            raise ConfigError("trainer.rank_timeout", rank_timeout, "must be above 0 seconds")
        super().__init__(*args, **kwargs)
        if isinstance(self.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise UserError(
                f"trainer.strategy = {type(self.strategy).__name__}: it writes checkpoints of its "
                "own, without memory; use trainer.strategy=sharded (FSDP2), which "
                "shards weights and optimiser state alike"
            )
        self.writer = Writer(background_save)
        self.strategy.checkpoint_io = FolderCheckpointIO(self.writer)
        self.saved_step = -1
        """The step of the newest checkpoint of this process."""
        self._run_name = ""
        self._moment: tuple[Any, ...] = ()
        self._part: weakref.ref[RankPart] | None = None
        self.callbacks: list[Callback]
        self.callbacks += [RunBounds(), Liveness(rank_timeout)]

    def name_run(self) -> None:
        """Draw a name for this start of the run, alike on all ranks (a collective)."""
        self._run_name = self.strategy.broadcast(secrets.token_hex(4))

    def _copy_part(self, bank: MemoryBank | None, keep: bool) -> RankPart:
        """This rank's part as of now: the copy that waits to be written, if nothing has changed."""
        batches: Any = self.fit_loop.epoch_loop.batch_progress.total
        random = bytes(torch.get_rng_state().numpy())
        moment = (self.global_step, batches.started, batches.processed, keep, random)
        part = self._part() if self._part is not None and self._moment == moment else None
        if part is None:
            self.writer.wait()
            part = RankPart(self.global_rank, bank, keep)
            self._moment, self._part = moment, weakref.ref(part)
        return part

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Copy the state and have it written as a checkpoint folder.

        Every rank writes its part into a staging folder, and rank 0 gives the whole its name. Ranks
        meet through files, so a rank that is alone gets an error and no hang.

        Args:
            filepath: the folder to write.
            weights_only: leave out optimiser, position and memory.
            storage_options: unused.

        Raises:
            UserError: where it, or one before it, cannot be written.
        """
        module: Any = self.lightning_module
        target = Path(filepath)
        keep = module.save_memory and not weights_only
        bank = module.banks.get("train")
        info = {
            "step": self.global_step,
            "memory": bank is not None and keep,
            "weights_only": bool(weights_only),
            **resume_facts(getattr(self, "datamodule", None)),
        }
        part = self._copy_part(bank, keep)
        checkpoint = self._checkpoint_connector.dump_checkpoint(bool(weights_only))
        state = None
        if self.is_global_zero:
            state = apply_to_collection(checkpoint, Tensor, _to_host)
        staging = checkpoints.staging_folder(target, self._run_name, self.global_step)
        self.saved_step = self.global_step
        self.writer.submit(lambda: self._write(target, staging, part, state, info))

    def _write(
        self,
        target: Path,
        staging: Path,
        part: RankPart,
        state: dict[str, Any] | None,
        info: dict[str, Any],
    ) -> None:
        try:
            staging.mkdir(parents=True, exist_ok=True)
            files = [part.write(staging)]
            if state is not None:
                files.append(staging / checkpoints.TRAINER_FILE)
                self.strategy.checkpoint_io.save_checkpoint(state, files[-1])
            checkpoints.mark_done(staging, part.rank, files)
            if state is not None:
                checkpoints.finish(staging, target, self.world_size, info)
        except Exception as error:
            reason = str(error) or type(error).__name__
            checkpoints.mark_failed(staging, part.rank, reason)
            if state is not None:
                checkpoints.remove(staging)
            raise UserError(
                f"checkpoint {target}: could not be written ({reason}); earlier ones are unharmed, "
                "go on with --ckpt_path last"
            ) from error
