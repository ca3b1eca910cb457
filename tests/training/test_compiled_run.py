"""A run compiles each stage once: new documents, validation, tests and resuming add nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compiling import Shapes, differences, noted
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from small import SEGMENT, Losses, Scalars, assert_alike, logs, make_data, make_module, state

from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.trainer import MemoryTrainer

STEPS, HALF = 12, 6
MODEL = {"num_layers": 3, "xl_cache": 16, "layers": [1], "copy": ["neighbours", "repeats"]}


class Stages(Callback):
    """Notes which graphs each step and each validation compiled, and what they differ in."""

    def __init__(self, graphs: list[Shapes]) -> None:
        self.graphs, self.known = graphs, 0
        self.made: dict[str, list[Shapes]] = {}

    def note(self, when: str) -> None:
        self.made[when] = self.graphs[self.known :]
        self.known = len(self.graphs)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.note(f"train {trainer.global_step}")

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.note(f"validate {trainer.global_step}.{_[-1]}")

    def on_test_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.note(f"test {_[-1]}")

    def again(self) -> dict[str, Any]:
        """By step what was compiled again in a stage, and the shapes in which it differs from the
        first; if there are none, a number of the host's changed."""
        first: dict[str, Shapes] = {}
        found: dict[str, Any] = {}
        for when, made in self.made.items():
            stage = when.split()[0]
            for graph in made:
                if stage in first:
                    found[when] = differences(first[stage], graph)
                first.setdefault(stage, graph)
        return found


@pytest.fixture
def graphs() -> Iterator[list[Shapes]]:
    with noted() as made:
        yield made


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
}


def fit(
    texts: Path, folder: Path, steps: int, stages: Stages, resume: Path | None = None, **model: Any
) -> tuple[MemoryTrainer, MemorizingLM, list[float]]:
    losses = Losses()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    trainer = MemoryTrainer(
        **QUIET,
        logger=Scalars(),
        val_check_interval=3,
        limit_val_batches=3,
        limit_test_batches=4,
        max_steps=steps,
        callbacks=[losses, keep, stages],
    )
    module = make_module(**MODEL, **model)
    data = make_data(texts, eval_rows=2)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer, module, losses.values


def test_each_stage_is_compiled_once(
    texts: Path, tmp_path: Path, graphs: list[Shapes], caplog: pytest.LogCaptureFixture
) -> None:
    """The memory fills and runs over, documents begin, rows of validation differ; a run resumes."""
    stages = Stages(graphs)
    trainer, whole, losses = fit(texts, tmp_path / "whole", STEPS, stages, compile=True)
    ended = state(whole)
    trainer.test(whole, datamodule=trainer.datamodule, verbose=False)
    assert {graph["l_new_ids_"] for graph in graphs} == {(4, SEGMENT), (2, SEGMENT)}
    assert not stages.again()
    compiled_by = {when.split()[0]: len(made) for when, made in stages.made.items() if made}
    assert compiled_by == {"train": 1, "validate": 1, "test": 1}

    before = len(graphs)
    again = Stages(graphs)
    again.known = before
    checkpoint = tmp_path / "whole" / f"step={HALF}.ckpt"
    _, resumed, tail = fit(texts, tmp_path / "half", STEPS, again, checkpoint, compile=True)
    assert not again.again()
    assert len(graphs) - before == 2, "a resumed run compiles what a new one does"
    assert losses[HALF:] == tail
    assert_alike(ended, state(resumed))
    assert not [r for r in caplog.records if "in parts" in r.getMessage()]

    _, _, expected = fit(texts, tmp_path / "plain", STEPS, Stages(graphs))
    assert losses == expected


def test_what_looks_at_the_memory_compiles_a_known_number_of_times(
    texts: Path, tmp_path: Path, graphs: list[Shapes]
) -> None:
    module = make_module(compile=True, **MODEL)
    counts: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(len(graphs))

    trainer = MemoryTrainer(
        **QUIET,
        logger=Scalars(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        val_check_interval=4,
        limit_val_batches=1,
        max_steps=STEPS,
        callbacks=[*logs(2, 4), Count()],
    )
    trainer.fit(module, datamodule=make_data(texts, eval_rows=2))
    assert counts[HALF] == counts[-1], [differences(graphs[0], graph) for graph in graphs[1:]]
