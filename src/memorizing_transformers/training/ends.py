"""The start and the end of a run: what belongs to it is its own, and every end is saved once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from ..errors import UserError
from .checkpoint import folder as checkpoints
from .monitors import check_monitors, is_of_monitor
from .signals import Interrupted

RESUME = "resume with --ckpt_path last"


def model_checkpoints(trainer: Any) -> list[ModelCheckpoint]:
    """The callbacks that save by a rule."""
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def folders_of(trainer: Any) -> list[Path]:
    """The folders that a run writes its logs and checkpoints to, as far as they are known.

    To be asked on rank 0 alone, before or after the callbacks were set up.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    runs = [Path(logger.log_dir)] if isinstance(logger, CSVLogger | TensorBoardLogger) else []
    found = dict.fromkeys(runs)
    for callback in model_checkpoints(trainer):
        home = runs[0] if runs else Path(trainer.default_root_dir)
        found[Path(callback.dirpath or home / "checkpoints")] = None
    return list(found)


class RunStart(Callback):
    """Names a start of a run, tells every rank its folder, and clears away what a dead one left."""

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be watched; ranks learn rank 0's folder (a collective)."""
        if stage == "fit":
            check_monitors(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger | TensorBoardLogger):
                logger._version = trainer.strategy.broadcast(logger.version)

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Rank 0 cleans up before anybody saves."""
        newest = 0
        if trainer.is_global_zero:
            for folder in folders_of(trainer):
                if folder.is_dir():
                    checkpoints.clean_leftovers(folder)
                    for path in checkpoints.candidates(folder)[:1]:
                        newest = max(newest, checkpoints.written(path))
        trainer.name_run(newest)

    def on_sanity_check_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Take the signals that Lightning has just taken; the same at the start of every stage."""
        trainer.signals.install()

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        """Note that there is something to lose."""
        trainer.begun = trainer.signals.stepping = True

    on_test_batch_start: Any = on_train_batch_start
    on_predict_batch_start: Any = on_train_batch_start

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        """The same, unless it only tries out whether validation works."""
        trainer.begun |= not trainer.sanity_checking
        trainer.signals.stepping = True


class RunEnd(Checkpoint):
    """Ends a run behind a step where a signal asks for it, and saves the end once.

    A ``Checkpoint``, so that it comes after the trainer's other ones.
    """

    def __init__(self) -> None:
        self._hosts: Any = None
        """The processes that agree behind each step: on their hosts, so that no GPU is waited for;
        None for one process."""

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Meet the other processes (a collective)."""
        if trainer.world_size > 1 and self._hosts is None:
            self._hosts = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Note where the loops are: from here, and from no later place, they resume exactly."""
        trainer.note_loops()
        accumulating = trainer.fit_loop._should_accumulate()
        if self._signalled(trainer) and not accumulating:
            raise Interrupted(trainer.signals.received)

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        """End between two batches of a validation, a test or a prediction too."""
        if self._signalled(trainer):
            raise Interrupted(trainer.signals.received)

    on_test_batch_end: Any = on_validation_batch_end
    on_predict_batch_end: Any = on_validation_batch_end

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """A validation that has ended need not be done again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.note_loops()

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Save the last step, so that a finished run can be resumed whatever was saved before."""
        if _is_over(trainer):
            save_end(trainer)

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what a signal has ended, or a callback that watches a name that was not logged."""
        if trainer.state.fn == "fit" and trainer.begun and is_of_monitor(exception, trainer):
            try:
                path = save_end(trainer)
                trainer.writer.wait()
            except UserError as error:
                rank_zero_info(f"step {trainer.global_step} could not be saved ({error})")
            else:
                if path:
                    rank_zero_info(f"step {trainer.global_step} is saved as {path}; {RESUME}")
        if not isinstance(exception, Interrupted) or exception.line or not trainer.begun:
            return
        exception.line = f"stopped by {exception.name}"
        if trainer.state.fn != "fit":
            return
        exception.line += f" at step {trainer.global_step}"
        try:
            path = save_end(trainer)
            trainer.writer.wait()
        except UserError as error:
            exception.line += f", which could not be saved ({error})"
        else:
            exception.line += f", saved as {path}; {RESUME}" if path else ", which is not saved"

    def _signalled(self, trainer: Any) -> bool:
        """Whether any rank has got a signal, alike on all (a collective)."""
        signals = trainer.signals
        found = signals.received is not None
        if self._hosts is not None:
            count = torch.tensor(int(found), device="cpu")
            torch.distributed.all_reduce(count, group=self._hosts)
            found = bool(count)
        if found:
            signals.ending = True
            signals.received = signals.received or 15
        return found


def _is_over(trainer: Any) -> bool:
    """Whether no step follows an epoch that has just ended or was broken off."""
    loop = trainer.fit_loop
    if trainer.should_stop and loop._can_stop_early:
        return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return 0 <= loop.max_epochs <= loop.epoch_progress.current.processed


def save_end(trainer: Any) -> Path | None:
    """Save the state as of the last step, unless that is done.

    Returns:
        the checkpoint that holds it, or None where the trainer saves none.
    """
    if trainer.fast_dev_run or not trainer.global_step:
        return None
    found: Path | None = trainer.saved_now()
    if found is not None:
        return found
    callbacks = model_checkpoints(trainer)
    others = [c for c in trainer.checkpoint_callbacks if not isinstance(c, RunEnd)]
    if not others:
        return None
    if not callbacks:
        target = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    else:
        # Rank 0 alone looks at the disk, so that all agree.
        target = trainer.strategy.broadcast(_name_of_end(trainer, callbacks[0]))
    trainer.save_end(target)
    for callback in callbacks:
        # The callback has nothing to add at the end.
        callback._last_global_step_saved = trainer.global_step
        callback._last_checkpoint_saved = callback._last_checkpoint_saved or str(target)
    if callbacks and callbacks[0].save_last:
        callbacks[0].last_model_path = str(target)
    return target


def _name_of_end(trainer: Any, callback: ModelCheckpoint) -> Path:
    """The first callback's own last checkpoint, or a name that is free or this run's own."""
    folder = Path(callback.dirpath or "")
    own = (
        Path(callback.last_model_path) if callback.save_last and callback.last_model_path else None
    )
    if own is not None and own.parent == folder:
        return own
    kept = kept_by(trainer)
    name = "last" if "{" in callback.CHECKPOINT_NAME_LAST else callback.CHECKPOINT_NAME_LAST
    target, number = folder / f"{name}.ckpt", 0
    while str(target) in kept or target.is_file() or not trainer.is_own(target):
        number += 1
        target = folder / f"{name}-v{number}.ckpt"
    return target


def kept_by(trainer: Any) -> set[str]:
    """The checkpoints that a ``ModelCheckpoint`` counts on."""
    return {
        str(path)
        for c in model_checkpoints(trainer)
        for path in (*c.best_k_models, c.best_model_path, c.last_model_path)
        if path
    }


def what_ended(trainer: Any) -> str:
    """What ended a training run that came to its end."""
    loop = trainer.fit_loop
    if 0 in (trainer.limit_train_batches, trainer.num_training_batches):
        return "there were no training batches"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps = {trainer.max_steps} reached"
    for callback in trainer.callbacks:
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "the time was up"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping by {callback.monitor}"
    if 0 <= loop.max_epochs <= loop.epoch_progress.current.processed:
        return f"trainer.max_epochs = {loop.max_epochs} reached"
    return "trainer.should_stop was set"


def end_line(trainer: Any) -> str:
    """What ended a run, and how to continue it."""
    line = f"training ended at step {trainer.global_step}: {what_ended(trainer)}"
    saved = trainer.saved_now()
    if saved is None:
        return line if trainer.begun else f"{line}; nothing to do"
    return f"{line}; saved as {saved}; to train longer raise the limit and {RESUME}"
