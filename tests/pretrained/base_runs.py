"""Small training runs of a pretrained model with a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.model import MemoryConfig
from memorizing_transformers.pretrained.adapt import AdaptConfig
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig
from memorizing_transformers.training.trainer import MemoryTrainer

KINDS = ["gates", "projections", "lora", "all"]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def module_of(home: Path, base: str = "base", train: str = "gates", **options: Any) -> MemorizingLM:
    memory = {"size": 64, "top_k": 4, "combine": "joint-bias", "temperature": True, "layers": [1]}
    settings = {"xl_cache": 8, "memory": MemoryConfig(**{**memory, **options.pop("memory", {})})}
    torch.manual_seed(0)
    return MemorizingLM(
        OptimizerConfig(lr=1e-2, schedule="constant", warmup_steps=0),
        base=str(home / base),
        adapt=AdaptConfig(train=train),  # type: ignore[arg-type]
        **{**settings, **options},
    )


def data_of(home: Path, **options: Any) -> DocumentDataModule:
    settings = {
        "tokenizer": str(home / "base"),
        "batch_rows": 2,
        "segment_length": 16,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(home / "cache"),
        "num_workers": 1,
    }
    return DocumentDataModule(str(home / "texts"), **{**settings, **options})


def trainer_of(*callbacks: Callback, steps: int = 6) -> MemoryTrainer:
    return MemoryTrainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_steps=steps,
        limit_val_batches=2,
        callbacks=[*callbacks],
    )


def fit(
    home: Path, folder: Path, steps: int = 6, resume: Path | None = None, **options: Any
) -> tuple[MemorizingLM, list[float]]:
    losses = Losses()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    module = module_of(home, **options)
    trainer_of(losses, keep, steps=steps).fit(module, datamodule=data_of(home), ckpt_path=resume)
    return module, losses.values
