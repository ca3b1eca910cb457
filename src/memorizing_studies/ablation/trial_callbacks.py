"""Callbacks that a trial adds to a training run or an evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from memorizing_transformers.errors import ConfigError

from .json_files import read_json, write_json
from .taken_weights import load_weights

PROGRESS_SECONDS = 1.0
"""Seconds between two updates of ``progress.json``."""


class TrialProgress(Callback):
    """Writes the current step, and saves a checkpoint when training ends.

    Args:
        folder: the folder of ``progress.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        self._written = 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step."""
        if time.monotonic() - self._written > PROGRESS_SECONDS:
            self._written = time.monotonic()
            write_json(self.path, {"step": trainer.global_step, "of": trainer.max_steps})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save, if the last step is not saved yet, as with a budget of minutes."""
        if trainer.saved_step != trainer.global_step:
            trainer.save_checkpoint(Path(trainer.log_dir) / "checkpoints" / "last.ckpt")


class StartFrom(Callback):
    """Puts another trial's weights into a network that begins to train.

    Args:
        checkpoint: the weights.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Load, in place, so that the optimiser keeps the same parameters."""
        tokenizer = trainer.datamodule.text_tokenizer
        load_weights(pl_module.net, self.checkpoint, fresh_memory=True, tokenizer=tokenizer)


class SameTexts(Callback):
    """Refuses texts that have changed since another trial of the plan read them.

    Trials with the same data settings must read the same texts, whenever they run. Each writes
    ``texts.json`` to its folder, and the others compare it with theirs.

    Args:
        folder: the trial's folder, VARIANT/seed-N in the plan's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Compare before anything is read.

        Raises:
            ConfigError: if they have changed.
        """
        data = trainer.datamodule
        own = {"settings": repr(data.settings), "store": data.store_folder.name}
        plan = self.folder.parent.parent
        for path in sorted(plan.glob("*/*/texts.json")):
            other = read_json(path)
            if other["settings"] == own["settings"] and other["store"] != own["store"]:
                trial = path.parent.relative_to(plan).as_posix()
                remedy = f"texts have changed since {trial} read them; give another --out"
                raise ConfigError("data.source", data.settings.sources.source, remedy)
        write_json(self.folder / "texts.json", own)
