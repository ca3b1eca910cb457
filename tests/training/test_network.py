"""A network of another class trains, is measured, is saved and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Losses, Scalars, logs, make_data, make_module, state
from torch import Tensor, nn

from memorizing_transformers.errors import UserError
from memorizing_transformers.memory import Memory, MemoryBank, SegmentPairs, make_search
from memorizing_transformers.model import MemorizingNet, MemoryConfig, MemoryReader, ModelOutput
from memorizing_transformers.training.callbacks import PredictionWriter
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.trainer import MemoryTrainer

LAYER = 3
"""The number of the only layer that has a memory."""


class Recurrent(MemorizingNet):
    """A GRU whose state is the query to the memory."""

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.project = nn.Linear(width, 3 * width)
        self.reader = MemoryReader(1, 1, width, config, make_search("exact"))
        self.logits = nn.Linear(width, 256)
        self.config = config

    def forward(self, input_ids: Tensor, memory: MemoryBank | None = None) -> ModelOutput:
        hidden, _ = self.recurrence(self.embedding(input_ids))
        query, key, value = self.project(hidden)[:, None].chunk(3, dim=-1)
        heads, retrievals = value, {}
        if memory is not None and LAYER in memory.memories:
            store = memory.memories[LAYER]
            heads, retrievals[LAYER] = self.reader(query, value, None, hidden, store)
        pairs = {LAYER: (key.detach(), value.detach())}
        return ModelOutput(self.logits(heads[:, 0]), SegmentPairs(pairs, {}), retrievals)

    def new_memory(
        self, batch_size: int, device: Any = None, size: int | None = None
    ) -> MemoryBank:
        size = self.config.size if size is None else size
        width = self.embedding.embedding_dim
        memory = {LAYER: Memory(batch_size, 1, size, width, device=device)} if size else {}
        return MemoryBank(batch_size, memory)

    def architecture(self) -> dict[str, Any]:
        return {"class": "Recurrent", "width": self.embedding.embedding_dim}

    def readers(self) -> dict[int, MemoryReader]:
        return {LAYER: self.reader}


class RecurrentLM(MemorizingLM):
    """Trains it."""

    def build_net(self) -> MemorizingNet:
        return Recurrent(self.config.d_model, self.config.memory)


def fit(texts: Path, root: Path, kind: type[MemorizingLM] = RecurrentLM, **options: Any) -> Any:
    """Train; what was logged, the losses and the module."""
    logger, losses = Scalars(), Losses()
    keep = ModelCheckpoint(root, every_n_train_steps=6, save_top_k=-1)
    trainer = MemoryTrainer(
        accelerator="cpu",
        devices=1,
        max_steps=12,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(root),
        callbacks=[losses, keep, *logs(often=1, seldom=1)],
    )
    module = make_module(kind, layers=None, refresh_every_n_steps=5, drop_below_cosine=0.2)
    trainer.fit(module, datamodule=make_data(texts), **options)
    return logger.values, losses.values, module, trainer


def test_a_network_of_another_class_trains_and_resumes(texts: Path, tmp_path: Path) -> None:
    logged, losses, module, trainer = fit(texts, tmp_path / "first")
    assert losses[-1] < losses[0]
    assert {*logged} >= {
        "val/loss",
        "memory/gain_bits_per_token",
        f"memory/gate/layer{LAYER}_head0",
        f"memory/retrieved_age_tokens/layer{LAYER}",
        f"staleness/key_cosine/layer{LAYER}",
        "time/search_ms",
    }
    assert logged[f"memory/fill/layer{LAYER}"][11] > 0
    (half,) = (tmp_path / "first").glob("*step=6.ckpt")
    _, rest, resumed, _ = fit(texts, tmp_path / "again", ckpt_path=str(half))
    assert rest == losses[6:]
    assert all(torch.equal(x, state(resumed)[name]) for name, x in state(module).items())
    with pytest.raises(UserError, match="another architecture"):
        fit(texts, tmp_path / "other", MemorizingLM, ckpt_path=str(half))

    trainer.callbacks.append(PredictionWriter(tmp_path / "predictions.parquet"))
    trainer.predict(module, datamodule=make_data(texts), return_predictions=False)
    assert (tmp_path / "documents.parquet").exists()


def test_what_a_network_must_give_is_named() -> None:
    with pytest.raises(NotImplementedError):
        MemorizingNet()(torch.zeros(1, 4, dtype=torch.long))
    assert MemorizingNet().memory_parameters() == []
