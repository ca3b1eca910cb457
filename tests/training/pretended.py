"""A trainer on the second device of ``two_devices``, with all that the command line's has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from small import logs

from memorizing_transformers.training.trainer import MemoryTrainer

STEPS, SAVED = 8, 4


class Pretended(CPUAccelerator):
    """Lets a strategy have any device."""

    def setup_device(self, device: torch.device) -> None:
        pass


def make(root: Path, device: torch.device, **options: Any) -> MemoryTrainer:
    """A trainer with all that the command line's has, on a device."""
    settings: dict[str, Any] = {
        "accelerator": Pretended(),
        "devices": 1,
        "strategy": SingleDeviceStrategy(device=device),
        "default_root_dir": str(root),
        "max_steps": STEPS,
        "logger": TensorBoardLogger(root),
        "callbacks": [
            ModelCheckpoint(every_n_train_steps=SAVED, save_last=True, save_top_k=-1),
            *logs(4, 4),
        ],
        "val_check_interval": 4,
        "limit_val_batches": 3,
        "limit_test_batches": 3,
        "limit_predict_batches": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 2,
        "enable_model_summary": False,
        "enable_progress_bar": True,
        "use_distributed_sampler": False,
        "inference_mode": False,  # the second device knows none
    }
    return MemoryTrainer(**{**settings, **options})
