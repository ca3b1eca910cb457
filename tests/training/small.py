"""Small modules, data and trainers, and what the tests of the training room ask of them."""

from __future__ import annotations

import contextlib
import io
import math
import random
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.memory import Memory
from memorizing_transformers.model import MemoryConfig, Transformer
from memorizing_transformers.training.callbacks import (
    LossByPosition,
    RetrievalHistograms,
    RetrievalLogging,
    RetrievalSamples,
    StalenessLogging,
    StepTiming,
    Throughput,
)
from memorizing_transformers.training.cli import main
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig

SEGMENT = 16


class Run(NamedTuple):
    """A finished run of the command line."""

    config: Path
    root: Path
    folder: Path
    cli: Any
    output: str
    """What it printed."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


def command(*args: Any) -> tuple[int, str, str]:
    """Run ``python train.py ARGS`` in this process: exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict("os.environ"),  # Lightning notes ranks there
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr("sys.argv", ["train.py", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def write_texts(folder: Path) -> Path:
    """Fourteen documents, each of its own few words, which come back throughout it.

    By their names three fall to validation and three to the test.
    """
    folder.mkdir()
    draw = random.Random(0)
    for index in range(14):
        names = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(6)]
        length = 150 + 43 * index
        text = " ".join(draw.choice(names) for _ in range(length))[:length]
        (folder / f"story{index:02d}.txt").write_text(text, "utf-8")
    return folder


def make_data(texts: Path, **options: Any) -> DocumentDataModule:
    """Documents as bytes, four rows, segments of 16, a fifth each for validation and test."""
    settings: dict[str, Any] = {
        "batch_rows": 4,
        "segment_length": SEGMENT,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(texts.parent / "cache"),
        "num_workers": 1,
    }
    return DocumentDataModule(str(texts), **{**settings, **options})


def make_module(kind: type[MemorizingLM] = MemorizingLM, **settings: Any) -> MemorizingLM:
    """Two layers of width 16, the second with a memory of 32; keys of memory go into it."""
    memory = {"size": 32, "top_k": 4, "layers": [-1]}
    for key in [*settings]:
        if key in MemoryConfig.__dataclass_fields__:
            memory[key] = settings.pop(key)
    optimizer = {"lr": 1e-2, "schedule": "constant", "warmup_steps": 0}
    optimizer |= settings.pop("optimizer", {})
    fields = {"d_model": 16, "num_layers": 2, "num_heads": 2}
    fields |= settings
    torch.manual_seed(0)
    return kind(OptimizerConfig(**optimizer), memory=MemoryConfig(**memory), **fields)


def logs(often: int = 0, seldom: int = 0) -> list[Callback]:
    """The logging that the quickstart lists, and the module's own; 0 for never."""
    return [
        Throughput(),
        RetrievalLogging(often),
        StalenessLogging(often),
        StepTiming(often),
        RetrievalHistograms(seldom),
        RetrievalSamples(seldom),
        *([LossByPosition()] if seldom else []),
    ]


def make_trainer(**options: Any) -> Trainer:
    """A trainer on one CPU that shows, logs and saves nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 12,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**{**settings, **options})


class Losses(Callback):
    """Keeps every step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].item())


class Scalars(DummyLogger):
    """Keeps what is logged: by name, step to value."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for name, value in metrics.items():
            self.values.setdefault(name, {})[step] = float(value)


def watched(texts: Path, steps: int = 20, every: int = 1, **settings: Any) -> Scalars:
    """What a training run logs."""
    logger = Scalars()
    module = make_module(**settings)
    trainer = make_trainer(
        max_steps=steps, logger=logger, log_every_n_steps=1, callbacks=logs(every)
    )
    trainer.fit(module, datamodule=make_data(texts))
    return logger


def state(module: MemorizingLM) -> dict[str, Tensor]:
    """Copies of the weights and of everything that the training bank holds."""
    tensors = {**module.state_dict(), **module.banks["train"].tensors()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same tensors to the last bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def fill_memory(rows: int, size: int, written: list[int], segment: int = 4) -> Memory:
    """A memory after ``written`` tokens a row; token p of a row has id p and step p // segment."""
    memory = Memory(rows, 1, size, 2)
    for start in range(0, max(written), segment):
        mask = torch.arange(start, start + segment) < torch.tensor(written)[:, None]
        pairs = torch.zeros(rows, 1, segment, 2)
        ids = torch.arange(start, start + segment).expand(rows, -1)
        memory.write(pairs, pairs, mask, ids, step=start // segment)
    return memory


def write_config(path: Path, texts: Path, root: Path) -> Path:
    """A config for the command line, of the sizes above."""
    path.write_text(
        yaml.safe_dump(
            {
                "final_report": True,
                "trainer": {
                    "default_root_dir": str(root),
                    "accelerator": "cpu",
                    "devices": 1,
                    "max_steps": 24,
                    "val_check_interval": 8,
                    "check_val_every_n_epoch": None,
                    "log_every_n_steps": 4,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "callbacks": [
                        {
                            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                            "init_args": {"save_last": True, "monitor": "val/loss"},
                        },
                        {"class_path": "Throughput"},
                        *(
                            {"class_path": name, "init_args": {"every_n_steps": 8}}
                            for name in (
                                "RetrievalLogging",
                                "StalenessLogging",
                                "StepTiming",
                                "RetrievalHistograms",
                                "RetrievalSamples",
                            )
                        ),
                        {"class_path": "LossByPosition"},
                    ],
                },
                "model": {
                    "d_model": 16,
                    "num_layers": 2,
                    "num_heads": 2,
                    "memory": {"size": 32, "top_k": 4, "layers": [-1]},
                    "optimizer": {"lr": 1e-2, "warmup_steps": 4},
                },
                "data": {
                    "source": str(texts),
                    "batch_rows": 4,
                    "segment_length": SEGMENT,
                    "validation_fraction": 0.2,
                    "test_fraction": 0.2,
                    "cache_dir": str(texts.parent / "cache"),
                    "num_workers": 1,
                },
            }
        )
    )
    return path


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By name, the scalars of a run's TensorBoard files: step to value."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def by_hand(net: Transformer, store: TokenStore, size: int | None = None) -> dict[str, float]:
    """One document after the other, segment by segment, with nothing of the trainer's.

    Args:
        net: the network.
        store: the documents.
        size: slots of the memory; the configured number by default.
    """
    nll, hits, tokens, num_bytes = 0.0, 0, 0, 0.0
    net.eval()
    for index in range(len(store)):
        document = torch.from_numpy(store.document(index).astype("int64"))
        bank = net.new_memory(1, size=size)
        inputs, targets = document[None, :-1], document[None, 1:]
        for ids, expected in zip(inputs.split(SEGMENT, 1), targets.split(SEGMENT, 1), strict=True):
            with torch.no_grad():
                output = net(ids, bank)
            bank.commit(output.pairs, token_ids=ids)
            logs = output.logits.double().log_softmax(-1)
            nll -= logs.gather(-1, expected[..., None]).sum().item()
            hits += int((output.logits.argmax(-1) == expected).sum())
        tokens += len(document) - 1
        num_bytes += float(store.num_bytes[index]) * (len(document) - 1) / len(document)
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "accuracy": hits / tokens,
    }
