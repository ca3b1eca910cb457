"""A Trainer whose checkpoints hold every row's memory, and are complete or absent."""

from __future__ import annotations

import contextlib
import functools
import secrets
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from ..errors import ConfigError, UserError
from ..memory import MemoryBank
from .checkpoint import folder as checkpoints
from .checkpoint.background import Writer
from .checkpoint.folder_io import FolderCheckpointIO
from .checkpoint.rank_state import RankPart
from .checkpoint.resume import resume_facts
from .ends import RunEnd, RunStart, folders_of, kept_by, model_checkpoints
from .liveness import Liveness
from .run_folders import Claim
from .signals import Interrupted, StopSignals


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class Save(NamedTuple):
    """What a checkpoint of this process holds."""

    batches: int
    """Batches taken before."""
    weights_only: bool
    asked: bool
    """Whether a ``ModelCheckpoint`` asked for it, and may remove it later."""


def _claimed(command: str) -> Callable[..., Any]:
    """The trainer's method of that name, run while this process owns its folders."""
    method = getattr(Trainer, command)

    @functools.wraps(method)
    def run(self: MemoryTrainer, *args: Any, **kwargs: Any) -> Any:
        with self.claimed(command):
            return method(self, *args, **kwargs)

    return run


class MemoryTrainer(Trainer):
    """A Trainer that saves folders: the trainer's part from rank 0, one more part from every rank.

    Args:
        args: as for ``Trainer``.
        background_save: Copy the state and write it to disk while training continues; at most one
            copy is held. If false, training waits for the disk.
        rank_timeout: Seconds that a rank may be silent before the other ranks end the run.
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
        if isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                "trainer.strategy: processes copied from this one (ddp_spawn, ddp_fork, "
                "ddp_notebook) cannot share its checkpoints and memory; use trainer.strategy=ddp"
            )
        self.writer = Writer(background_save)
        self.strategy.checkpoint_io = FolderCheckpointIO(
            self.writer, self.strategy.broadcast, self._may_remove
        )
        self.signals = StopSignals()
        # Ranks agree on signals by RunEnd. Lightning's way would make each step wait for its GPU.
        self.fit_loop.epoch_loop._broadcast_sigterm_tensor = (  # type: ignore[method-assign]
            lambda: None
        )
        self.begun = False
        """Whether the current command has begun a batch; before that nothing can be lost."""
        self.saved_step = -1
        """The step of the newest checkpoint of this process from which training can resume."""
        self._saves: dict[Path, Save] = {}
        """What this process has saved, by path, oldest first; equal on all ranks."""
        self._number = 0
        self._run_name = self._lineage = ""
        self._written = 0
        self._loops: tuple[int, dict[str, Any]] = (-1, {})
        self._moment: tuple[Any, ...] = ()
        self._part: weakref.ref[RankPart] | None = None
        self.callbacks: list[Callback]
        self.liveness = Liveness(rank_timeout)
        self.callbacks[:0] = [RunStart()]
        self.callbacks += [RunEnd(), self.liveness]

    fit: Any = _claimed("fit")
    validate: Any = _claimed("validate")
    test: Any = _claimed("test")
    predict: Any = _claimed("predict")

    @contextlib.contextmanager
    def claimed(self, command: str) -> Iterator[None]:
        """Own the folders of a command and handle signals; a failed start leaves no folder.

        Raises:
            UserError: if another live run owns a folder.
            Interrupted: if a signal came after the last step.
        """
        claim, self.begun = Claim(), False
        with self.signals.watching():
            try:
                # Before other ranks are launched, so that none remain after a refusal.
                if self.is_global_zero and not self.fast_dev_run:  # type: ignore[attr-defined]
                    claim.number(self.loggers)
                    if command == "fit":
                        claim.lock(folders_of(self))
                yield
            finally:
                claim.release(keep=self.begun or not sys.exc_info()[1])
            if self.signals.received:
                name = signal.Signals(self.signals.received).name
                line = f"stopped by {name} after {command} had ended; nothing is lost"
                raise Interrupted(self.signals.received, line)

    def name_run(self, newest: int) -> None:
        """Draw a name for this start of the run, equal on all ranks (a collective).

        Args:
            newest: when the newest checkpoint in the run's folders was written.
        """
        self._run_name = self.strategy.broadcast(secrets.token_hex(4))
        self._number, self._saves, self.saved_step = 0, {}, -1
        self._lineage, self._written = self._run_name, newest
        if self.ckpt_path is not None and self.is_global_zero:
            resumed = Path(self.ckpt_path)
            self._lineage = checkpoints.read_manifest(resumed).get("run", self._run_name)
            # Checkpoints written from here on must be newer than those of abandoned steps.
            near = [path for path in resumed.parent.iterdir() if checkpoints.is_complete(path)]
            self._written = max(newest, *map(checkpoints.written, near))

    def note_loops(self) -> None:
        """Keep the state of the loops."""
        self._loops = (self._batches, self.fit_loop.state_dict())

    @property
    def _batches(self) -> int:
        """Batches that training has taken, over all epochs."""
        total: Any = self.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def saved_now(self, weights_only: bool = False) -> Path | None:
        """The newest checkpoint that holds the current state.

        Args:
            weights_only: also accept a checkpoint of the weights alone.
        """
        kept = kept_by(self)
        found = [
            path
            for path, save in self._saves.items()
            if save.batches == self._batches
            and (weights_only or not save.weights_only)
            and (str(path) in kept or not save.asked)
        ]
        if found:
            return found[-1]
        resumed = None if self.begun or self.ckpt_path is None else Path(self.ckpt_path)
        return resumed if self.state.fn == "fit" else None

    def is_own(self, target: Path) -> bool:
        """Whether a path is free or holds a checkpoint of this run, from any of its starts."""
        try:
            return checkpoints.read_manifest(target).get("run", self._lineage) == self._lineage
        except checkpoints.DamagedCheckpoint:
            return not (target / checkpoints.MANIFEST).exists()

    def _may_remove(self, path: Path) -> bool:
        """Whether a checkpoint may be removed: only in training, if no callback keeps it."""
        return self.state.fn == "fit" and str(path) not in kept_by(self)

    def _copy_part(self, bank: MemoryBank | None, keep: bool) -> RankPart:
        """This rank's current part; if nothing has changed, the copy that waits to be written."""
        total: Any = self.fit_loop.epoch_loop.batch_progress.total
        random = bytes(torch.get_rng_state().numpy())
        moment = (self.global_step, total.started, self._batches, keep, random)
        part = self._part() if self._part is not None and self._moment == moment else None
        if part is None:
            self.writer.wait()
            module: Any = self.lightning_module
            gradients = module.accumulated_gradients()
            part = RankPart(self.global_rank, bank, keep, gradients)
            self._moment, self._part = moment, weakref.ref(part)
        return part

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint folder.

        Every rank writes its part into a staging folder, and rank 0 then renames that folder. Ranks
        wait for each other through files, so a rank that is left alone gets an error and does not
        hang. A checkpoint that a plain ``ModelCheckpoint`` asks for is written in the background;
        any other is complete on return.

        Args:
            filepath: the folder to write.
            weights_only: leave out optimiser, position and memory.
            storage_options: unused.

        Raises:
            UserError: if this checkpoint, or an earlier one, cannot be written.
        """
        target = Path(filepath)
        self._save(target, bool(weights_only))
        if not self._can_wait(target):
            self.writer.wait()

    def save_end(self, target: Path) -> None:
        """Write the checkpoint at the end of a run, in the background."""
        self._save(target, False)

    def _can_wait(self, target: Path) -> bool:
        """Whether ``ModelCheckpoint`` asks for it, and nothing uses it as soon as it is saved."""
        rules = model_checkpoints(self)
        quiet = all(
            type(logger).after_save_checkpoint
            in (Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint)
            for logger in self.loggers
        )
        plain = (type(c) is ModelCheckpoint and c.save_last != "link" for c in rules)
        return quiet and all(plain) and str(target) in kept_by(self)

    def _save(self, target: Path, weights_only: bool) -> None:
        """Copy the state and have it written, unless this path already holds the same state."""
        save = Save(self._batches, weights_only, str(target) in kept_by(self))
        if self._saves.pop(target, None) == save:
            self._saves[target] = save
            return
        module: Any = self.lightning_module
        keep = module.save_memory and not weights_only
        bank = module.banks.get("train")
        self._written = max(time.time_ns(), self._written + 1)
        info = {
            "step": self.global_step,
            "memory": bank is not None and keep,
            "weights_only": weights_only,
            "run": self._lineage,
            "written": self._written,
            **resume_facts(module.datamodule),
        }
        part = self._copy_part(bank, keep)
        checkpoint = self._checkpoint_connector.dump_checkpoint(weights_only)
        if self._loops[0] == save.batches:
            checkpoint["loops"]["fit_loop"] = self._loops[1]
        state = None
        if self.is_global_zero:
            state = apply_to_collection(checkpoint, Tensor, _to_host)
            checkpoints.reserve(target)
        self._number += 1
        staging = checkpoints.staging_folder(target, self._run_name, self._number)
        self._saves[target] = save
        if not weights_only:
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
                ended = self.liveness.has_ended
                checkpoints.finish(staging, target, self.world_size, info, has_ended=ended)
        except Exception as error:
            reason = str(error) or type(error).__name__
            checkpoints.mark_failed(staging, part.rank, reason)
            if state is not None:
                checkpoints.remove(staging)
                checkpoints.unreserve(target)
            raise UserError(
                f"checkpoint {target}: could not be written ({reason}); earlier ones are "
                "not affected; resume with --ckpt_path last"
            ) from error
