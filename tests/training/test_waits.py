"""No training step makes the host wait for its GPU, but where figures are logged."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.connectors import data_connector
from pretended import make
from small import SEGMENT, logs, make_data, make_module, make_trainer
from two_devices import AWAY, two_devices
from waits import Wait, Waits

from memorizing_transformers.training.ends import RunEnd
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.unwanted_messages import drop_unwanted_messages

OFTEN = 8
STEPS = 2 * OFTEN - 1
CLEAN = {*range(STEPS)} - {0, 1, OFTEN - 1, OFTEN, OFTEN + 1}
"""Steps at which nothing is logged, observed (every 8 steps from 0 on) or timed (one later)."""


class Counted(MemorizingLM):
    """Notes which step a wait belongs to, from the copy of its batch on."""

    waits: Waits
    resets = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.waits.step = self.global_step
        self.resets += int(batch.reset.sum()) if self.global_step in CLEAN else 0
        return batch


def waits_of(root: Path, texts: Path, steps: int = STEPS, **settings: Any) -> list[Wait]:
    """All waits of a run in its training steps."""
    trainer: dict[str, Any] = settings.pop("trainer", {})
    with two_devices("cuda"):
        module: Any = make_module(Counted, **settings)
        module.waits = Waits()

        class Enter(Callback):
            def on_train_start(self, *_: Any) -> None:
                module.waits.__enter__()

            def on_train_end(self, *_: Any) -> None:
                module.waits.__exit__(None, None, None)

        run = make(
            root,
            AWAY,
            max_steps=steps,
            callbacks=[Enter(), *logs(OFTEN, OFTEN)],
            limit_val_batches=0,
            log_every_n_steps=OFTEN,
            enable_checkpointing=False,
            **trainer,
        )
        run.fit(module, datamodule=make_data(texts, cut_tokens=70))
    assert module.resets > 0
    return module.waits.seen


CASES: dict[str, dict[str, Any]] = {
    "adamw": {"xl_cache": SEGMENT},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "muon-like": {"optimizer": {"name": "torch.optim.NAdam"}},
    "two layers, int8, bucketed": {
        "layers": [0, 1],
        "dtype": "int8",
        "search": "bucketed",
        "recall_target": 0.9,
        "combine": "content",
        "position_bias": "t5",
    },
    "best recipe": {
        "copy": ["neighbours", "repeats"],
        "combine": "evidence",
        "temperature": True,
        "match_length": 8,
        "candidates": 2,
        "dropout": 0.1,
        "position_bias": "log",
    },
    "pairs dropped by age": {"drop_after_n_steps": 2},
    "accumulated, clipped": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}},
    "recomputed, joint": {"activation_checkpointing": True, "combine": "joint", "xl_cache": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_unless_it_logs(case: str, texts: Path, tmp_path: Path) -> None:
    found = waits_of(tmp_path, texts, **CASES[case])
    clean = [wait for wait in found if wait.step in CLEAN]
    assert clean == [], Counter((wait.what, wait.where) for wait in clean)
    assert any(wait.step == OFTEN - 1 for wait in found)  # it sees those of a step that logs


def test_ranks_agree_on_signals_without_their_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither by Lightning's broadcast nor by ours; a signal to another rank counts."""
    made, reduced, others = [], [], 0

    def all_reduce(count: Any, group: Any) -> None:
        reduced.append((count.device.type, group))
        count += others

    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: made.append(backend) or 7)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast", None)
    with two_devices("cuda"), Waits() as waits:
        trainer = make(tmp_path, AWAY)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
        end = RunEnd()
        ranks: Any = SimpleNamespace(world_size=2, signals=trainer.signals)
        for stage in ("fit", "validate"):
            end.setup(ranks, None, stage)  # type: ignore[arg-type]
        assert not end._signalled(ranks)
        others = 1
        assert end._signalled(ranks)
    assert waits.seen == []
    assert (made, reduced) == (["gloo"], [("cpu", 7)] * 2)
    assert trainer.signals.received == 15


def test_lightning_does_not_warn_of_the_copy_of_a_batch(texts: Path) -> None:
    """That our module keeps batches on the host is nothing that a user could change."""
    data_connector.warning_cache.clear()  # it warns once in a process
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drop_unwanted_messages()
        make_trainer(max_steps=1).fit(make_module(), datamodule=make_data(texts))
    assert not [one for one in said if "transfer_batch_to_device" in str(one.message)]


ASKED: dict[str, Any] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]),
    "list": lambda x: [float(one) for one in x[:1]],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: x.equal(x + 1),
    "mask": lambda x: x[x > 0],
    "copy": lambda x: x.cpu(),
}


@pytest.mark.parametrize("way", ASKED)
def test_each_way_to_ask_for_numbers_is_seen_once(way: str) -> None:
    with two_devices("cuda"):
        x = torch.ones(3, device=AWAY)
        with Waits() as waits:
            ASKED[way](x)
        ASKED[way](x)
    assert len(waits.seen) == 1
