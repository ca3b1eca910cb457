"""A run can be saved at any batch and by any loader, and what each rank owns comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import Losses, assert_alike, make_data, make_module, state
from torch import Tensor

from memorizing_transformers.errors import UserError
from memorizing_transformers.memory import MemoryBank
from memorizing_transformers.training.checkpoint.rank_state import (
    RankPart,
    load_gradients,
)
from memorizing_transformers.training.checkpoint.resume import restore_gradients
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.trainer import MemoryTrainer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1,
    "limit_val_batches": 1,
}


class SaveAtValidation(Callback):
    """Saves after every batch, when it is validated."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batches = folder, 0

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        trainer.save_checkpoint(self.folder / f"{done}.ckpt")


def fit(
    texts: Path,
    folder: Path,
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[MemorizingLM, list[float]]:
    losses = Losses()
    given = {**QUIET, "max_steps": 4, **(options or {})}
    trainer = MemoryTrainer(callbacks=[losses, SaveAtValidation(folder)], **given)
    module = make_module(dropout=0.1, **settings)
    trainer.fit(module, datamodule=make_data(texts), ckpt_path=resume)
    return module, losses.values


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_part_of_a_checkpoint(
    accumulate: int, precision: str, texts: Path, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate, "precision": precision}
    whole, losses = fit(texts, tmp_path / "whole", options=options)
    assert len(losses) == 4 * accumulate
    for batches in range(accumulate, 2 * accumulate + 1):
        checkpoint = tmp_path / "whole" / f"{batches}.ckpt"
        assert bool(load_gradients(checkpoint, [0])) == bool(batches % accumulate)
        resumed, rest = fit(texts, tmp_path / f"from {batches}", checkpoint, options)
        assert rest == losses[batches:]
        assert_alike(state(resumed), state(whole))
        # Saved again before another batch, it holds the same.
        _, rest = fit(texts, tmp_path / "again", checkpoint, options)
        assert rest == losses[batches:]


def test_gradients_wait_only_between_two_optimiser_steps(texts: Path) -> None:
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(bool(module.accumulated_gradients()))

    options = {**QUIET, "limit_val_batches": 0, "val_check_interval": None, "max_steps": 3}
    trainer = MemoryTrainer(callbacks=[Look()], accumulate_grad_batches=3, **options)
    trainer.fit(make_module(), datamodule=make_data(texts))
    assert seen == [True, True, False] * 3


def write_parts(folder: Path, gradients: list[dict[str, Tensor]]) -> None:
    folder.mkdir(exist_ok=True)
    for rank, held in enumerate(gradients):
        RankPart(rank, None, gradients=held).write(folder)


def test_other_ranks_take_the_mean_of_what_was_accumulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memorizing_transformers.training.checkpoint.folder.verify", lambda *_: {})
    net = torch.nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    parts = [{n: torch.randn_like(p) for n, p in net.named_parameters()} for _ in range(2)]
    write_parts(tmp_path / "two", parts)
    write_parts(tmp_path / "sharded", [parts[0], {}])
    write_parts(tmp_path / "none", [{}, {}])
    mean = (parts[0]["weight"] + parts[1]["weight"]) / 2
    for name, rank, ranks, expected in (
        ("two", 0, 2, parts[0]["weight"]),
        ("two", 1, 2, parts[1]["weight"]),
        ("two", 0, 1, mean),
        ("two", 3, 4, mean),
        ("sharded", 1, 2, parts[0]["weight"]),
        ("sharded", 0, 1, parts[0]["weight"]),
    ):
        net.zero_grad()
        place: Any = (tmp_path / name, {"world_size": 2}, rank, ranks, net)
        assert restore_gradients(*place)
        assert torch.equal(net.weight.grad, expected), (name, rank, ranks)
        assert net.bias.grad is None
    # Sharded ranks have no gradient of their own: each takes a shard of the mean.
    with monkeypatch.context() as patch:
        patch.setattr(
            "memorizing_transformers.training.checkpoint.resume.is_sharded", lambda _: True
        )
        assert restore_gradients(tmp_path / "two", {"world_size": 2}, 1, 2, net)  # type: ignore[arg-type]
        assert torch.equal(net.weight.grad, mean)
    net.zero_grad()
    assert not restore_gradients(tmp_path / "none", {"world_size": 2}, 0, 2, net)  # type: ignore[arg-type]
    assert net.weight.grad is None


class Loader:
    """A plain loader that knows its position, as Lightning asks for it."""

    def __init__(self, batches: list[Any], rows: int) -> None:
        self.batches, self.rows, self.next = batches, rows, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        while self.next < len(self.batches):
            self.next += 1
            yield type(self.batches[0])(*(x[: self.rows] for x in self.batches[self.next - 1]))
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def test_plain_loaders_resume_without_a_datamodule(texts: Path, tmp_path: Path) -> None:
    data = make_data(texts)
    data.setup()
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]

    def plain(name: str, resume: Path | None = None, rows: int = 4) -> tuple[Any, list[float]]:
        losses = Losses()

        class Save(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                trainer.save_checkpoint(tmp_path / name / f"{trainer.global_step}.ckpt")

        options = {**QUIET, "limit_val_batches": 0, "val_check_interval": None, "max_steps": 6}
        trainer = MemoryTrainer(callbacks=[losses, Save()], **options)
        module = make_module(vocab_size=256, dropout=0.1)
        trainer.fit(module, train_dataloaders=Loader(batches, rows), ckpt_path=resume)
        return module, losses.values

    whole, losses = plain("whole")
    checkpoint = tmp_path / "whole" / "3.ckpt"
    resumed, rest = plain("resumed", checkpoint)
    assert rest == losses[3:]
    assert_alike(state(resumed), state(whole))
    with pytest.raises(UserError, match="a batch of 2 rows follows one of 4"):
        plain("fewer", checkpoint, rows=2)


def test_rows_that_the_ranks_cannot_share_are_refused(texts: Path, tmp_path: Path) -> None:
    from memorizing_transformers.training.checkpoint.resume import restore_rows

    fit(texts, tmp_path)
    place: Any = (tmp_path / "1.ckpt", {"world_size": 1}, 0, 3)
    with pytest.raises(UserError, match="3 ranks cannot share the checkpoint's 4 rows"):
        restore_rows(*place, MemoryBank)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_a_damaged_part_of_a_rank_is_refused_in_one_line(
    place: float, texts: Path, tmp_path: Path
) -> None:
    fit(texts, tmp_path)
    part = tmp_path / "3.ckpt" / "rank-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[int(place * len(content))] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError) as caught:
        fit(texts, tmp_path / "rest", tmp_path / "3.ckpt")
    message = str(caught.value)
    assert message.startswith("ckpt_path: ")
    assert str(part) in message
    assert str(tmp_path / "4.ckpt") in message
    assert "\n" not in message


class Places(Callback):
    """Keeps which document every row reads, and where."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.seen.append((batch.document.tolist(), batch.position.tolist()))


@pytest.mark.parametrize("batches", [None, 5])
def test_reloading_the_loader_goes_on_in_the_same_stream(
    batches: int | None, texts: Path, tmp_path: Path
) -> None:
    seen = []
    for every in (0, 1, 2):
        places, losses = Places(), Losses()
        options = {**QUIET, "limit_val_batches": 0, "val_check_interval": None, "max_steps": -1}
        options |= {"max_epochs": 4, "reload_dataloaders_every_n_epochs": every}
        if batches:
            options["limit_train_batches"] = batches

        class Save(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.reload_dataloaders_every_n_epochs == 1:
                    trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        trainer = MemoryTrainer(callbacks=[places, losses, Save()], **options)
        trainer.fit(make_module(), datamodule=make_data(texts))
        seen.append((places.seen, losses.values))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    epoch = len(seen[0][0]) // 4
    for step in (epoch - 1, epoch, epoch + 2):
        losses = Losses()
        trainer = MemoryTrainer(
            callbacks=[losses], **{**options, "reload_dataloaders_every_n_epochs": 1}
        )
        resume = tmp_path / f"{step}.ckpt"
        trainer.fit(make_module(), datamodule=make_data(texts), ckpt_path=resume)
        assert losses.values == seen[0][1][step:]
