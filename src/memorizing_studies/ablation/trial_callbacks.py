"""What a trial adds to a training run or an evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from memorizing_transformers.errors import ConfigError

from .evaluation import load_weights
from .json_files import read_json, write_json

PROGRESS_SECONDS = 1.0
"""Between two notes of how far a trial has come."""


class TrialProgress(Callback):
    """Notes the step now and then, and saves the end of a run whose time was up.

    Args:
        folder: where ``progress.json`` goes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        self._noted = 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        if time.monotonic() - self._noted > PROGRESS_SECONDS:
            self._noted = time.monotonic()
            write_json(self.path, {"step": trainer.global_step, "of": trainer.max_steps})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save."""
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

    Trials whose settings name the same texts must find the same ones, whenever they run. Each
    leaves ``texts.json`` in its folder, which the others compare.

    Args:
        folder: of the trial; the plan's folder holds ``VARIANT/seed-N`` of all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Compare before anything is read.

        Raises:
            ConfigError: where they have changed.
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
