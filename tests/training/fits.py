"""Runs that save every step and keep what they began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Losses, make_data, make_module
from torch import Tensor

from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.trainer import MemoryTrainer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
COSINE = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 20, "final_lr_share": 0.1}


class Start(Callback):
    """Keeps what a run begins with: weights, the optimiser's state by name, rates of every step."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Tensor]] = {}
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        named = dict(module.net.named_parameters())
        self.weights = {name: weight.detach().clone() for name, weight in named.items()}
        state = trainer.optimizers[0].state
        self.state = {
            name: {key: torch.as_tensor(value).clone() for key, value in state[weight].items()}
            for name, weight in named.items()
            if weight in state
        }

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


class Fit:
    """A run that saves every step; ``checkpoint(step)`` is one of them."""

    def __init__(
        self,
        texts: Path,
        folder: Path,
        steps: int,
        resume: Path | None = None,
        kind: type[MemorizingLM] = MemorizingLM,
        **settings: Any,
    ) -> None:
        self.folder, self.losses, self.start = folder, Losses(), Start()
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [self.losses, self.start, keep]
        trainer = MemoryTrainer(max_steps=steps, callbacks=callbacks, limit_val_batches=0, **QUIET)
        self.module = make_module(kind, **settings)
        trainer.fit(self.module, datamodule=make_data(texts), ckpt_path=resume)
        self.optimizer = trainer.optimizers[0]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step={step}.ckpt"
