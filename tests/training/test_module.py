"""The order of a training step, and what must leave training as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import (
    SEGMENT,
    Losses,
    Scalars,
    assert_alike,
    make_data,
    make_module,
    make_trainer,
    state,
)
from torch import Tensor

from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.memory import MemoryBank
from memorizing_transformers.model import Transformer
from memorizing_transformers.training.module import MemorizingLM

WITH_VALIDATION = {"val_check_interval": 3, "limit_val_batches": 4, "num_sanity_val_steps": 2}


def train(texts: Path, **options: Any) -> tuple:
    """Twelve steps of a model with dropout and XL cache: losses, weights and bank."""
    module = make_module(dropout=0.1, xl_cache=SEGMENT)
    losses = Losses()
    trainer = make_trainer(callbacks=[losses], check_val_every_n_epoch=None, **options)
    trainer.fit(module, datamodule=make_data(texts))
    return losses.values, state(module)


def test_validation_and_sanity_check_leave_training_bit_identical(texts: Path) -> None:
    losses, tensors = train(texts)
    validated_losses, validated_tensors = train(texts, **WITH_VALIDATION)
    assert len(losses) == 12
    assert validated_losses == losses
    assert_alike(validated_tensors, tensors)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_between_two_fits_leaves_training_bit_identical(
    texts: Path, stage: str
) -> None:
    outcomes = []
    for evaluate in (False, True):
        module, data, losses = make_module(dropout=0.1), make_data(texts), Losses()
        make_trainer(max_steps=5, callbacks=[losses]).fit(module, datamodule=data)
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        if evaluate:
            getattr(make_trainer(limit_val_batches=1.0), stage)(module, datamodule=data)
            assert_alike(dict(module.state_dict()), weights)
        make_trainer(max_steps=5, callbacks=[losses]).fit(module, datamodule=data)
        outcomes.append((losses.values, state(module)))
    (losses, tensors), (tested_losses, tested_tensors) = outcomes
    assert tested_losses == losses
    assert_alike(tested_tensors, tensors)


def test_tokenising_first_leaves_training_bit_identical(texts: Path, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):  # with an empty cache, then with a full one
        losses = Losses()
        data = make_data(texts, cache_dir=str(tmp_path), tokenizer="bpe", bpe_vocab_size=300)
        make_trainer(max_steps=3, callbacks=[losses]).fit(make_module(), datamodule=data)
        seen.append(losses.values)
    assert seen[0] == seen[1]


class Order(MemorizingLM):
    """Writes down what happens in a step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.order: list[str] = []
        self.observers.append(lambda batch, bank, output: self.order.append("observe"))

    def prepare_bank(self, stage: str, batch: Any) -> MemoryBank:
        self.order.append(f"clear {stage}")
        return super().prepare_bank(stage, batch)

    def read(self, stage: str, batch: Any) -> Any:
        self.order.append(f"read {stage}")
        return super().read(stage, batch)

    def commit(self, stage: str, batch: Any, output: Any) -> None:
        self.order.append(f"commit {stage}")
        super().commit(stage, batch, output)


def test_a_training_step_clears_reads_observes_and_commits_once(texts: Path) -> None:
    module = make_module(Order)
    make_trainer(max_steps=4).fit(module, datamodule=make_data(texts))
    assert module.order == ["clear train", "read train", "observe", "commit train"] * 4


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_step_clears_reads_and_commits_once(texts: Path, stage: str) -> None:
    module, data = make_module(Order), make_data(texts)
    getattr(make_trainer(limit_val_batches=1.0), stage)(module, datamodule=data)
    split = "validation" if stage == "validate" else "test"
    steps = data.plan(split).steps_per_epoch
    assert module.order == [f"clear {stage}", f"read {stage}", f"commit {stage}"] * steps


def test_the_bank_holds_every_token_once(texts: Path) -> None:
    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            memory, cache = module.banks["train"].memories[1], module.banks["train"].caches[0]
            assert torch.equal(memory.written, batch.position + batch.mask.sum(1))
            assert torch.equal(cache.length, memory.written.clamp(max=SEGMENT))
            last = memory.written - 1
            row = torch.arange(4)
            tokens = batch.input_ids[row, batch.mask.sum(1) - 1]
            assert torch.equal(memory.token_ids[row, last % memory.size].long(), tokens)
            assert (memory.steps[row, last % memory.size] == index).all()

    module = make_module(xl_cache=SEGMENT)
    trainer = make_trainer(max_steps=40, callbacks=[Watch()])
    trainer.fit(module, datamodule=make_data(texts))


class Gradients(Callback):
    """Keeps the gradients of every optimiser step and where its batches stood."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        named = module.net.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def test_accumulated_batches_are_successive_segments_committed_one_by_one(texts: Path) -> None:
    seen = Gradients()
    data = make_data(texts)
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[seen])
    trainer.fit(make_module(), datamodule=data)
    first, second = seen.batches
    assert torch.equal(first.document, second.document)
    assert torch.equal(second.position, first.position + SEGMENT)

    net = Transformer(make_module(vocab_size=256).config)
    bank = net.new_memory(4)
    for batch in (first, second):
        bank.reset(batch.reset)
        output = net(batch.input_ids, bank)
        (net.loss(output.logits, batch.targets, "sum") / batch.targets.numel() / 2).backward()
        bank.commit(output.pairs, batch.mask)
    expected = {name: p.grad for name, p in net.named_parameters()}
    assert len(seen.steps) == 1
    assert seen.steps[0].keys() == expected.keys()
    for name, gradient in seen.steps[0].items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    # The second segment reached the first one's pairs, so the gate learned something.
    assert expected["layers.1.attention.reader.gate.logit"].abs().max() > 0


def test_the_schedule_counts_optimiser_steps(texts: Path) -> None:
    optimizer = {"schedule": "constant", "warmup_steps": 10, "lr": 1.0}
    module = make_module(optimizer=optimizer)
    trainer = make_trainer(max_steps=3, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=make_data(texts))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.4)


class Nll(MemorizingLM):
    """Keeps every token's loss."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def read(self, stage: str, batch: Any) -> Any:
        output, nll = super().read(stage, batch)
        self.kept.append((nll.detach(), batch.mask))
        return output, nll


def test_every_token_weighs_the_same(texts: Path) -> None:
    # Where a document ends a segment is padded; its tokens count no more than others.
    module, losses = make_module(Nll), Losses()
    trainer = make_trainer(max_steps=50, callbacks=[losses])
    trainer.fit(module, datamodule=make_data(texts, batch_rows=1))
    assert any(not mask.all() for _, mask in module.kept)
    for (nll, mask), loss in zip(module.kept, losses.values, strict=True):
        assert not nll[~mask].any()
        assert loss == pytest.approx(nll[mask].sum().item() / SEGMENT)


def test_curves_of_training_are_of_single_steps_over_counted_tokens(texts: Path) -> None:
    module, logger = make_module(Nll), Scalars()
    trainer = make_trainer(max_steps=50, logger=logger, log_every_n_steps=5)
    trainer.fit(module, datamodule=make_data(texts, batch_rows=1))
    assert [*logger.values["train/loss"]] == [*range(4, 50, 5)]
    for step, loss in logger.values["train/loss"].items():
        nll, mask = module.kept[step]
        assert loss == pytest.approx(nll[mask].mean().item(), rel=1e-6)
        assert logger.values["train/perplexity"][step] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("accumulated", [2, 3])
def test_curves_of_accumulated_batches_are_of_all_of_them(texts: Path, accumulated: int) -> None:
    module, logger = make_module(Nll), Scalars()
    trainer = make_trainer(
        max_steps=8, logger=logger, log_every_n_steps=4, accumulate_grad_batches=accumulated
    )
    trainer.fit(module, datamodule=make_data(texts))
    assert [*logger.values["train/loss"]] == [3, 7]
    for step, loss in logger.values["train/loss"].items():
        kept = module.kept[step * accumulated : (step + 1) * accumulated]
        counted = torch.cat([nll[mask] for nll, mask in kept])
        assert loss == pytest.approx(counted.mean().item(), rel=1e-6)


@pytest.mark.parametrize("size", [0, 32])
def test_memory_parameters_train_only_beside_a_memory(texts: Path, size: int) -> None:
    module = make_module(combine="content", position_bias="learned-absolute", size=size)
    trainer = make_trainer(max_steps=3)
    trainer.fit(module, datamodule=make_data(texts))
    found = module.net.memory_parameters()
    assert len(found) == 3  # the content gate's matrix and vector, and the bias by age
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for parameter in found:
        assert parameter.requires_grad == (size > 0)
        assert (id(parameter) in trained) == (size > 0)


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"dtype": "bfloat16"}])
def test_bfloat16_stays_near_fp32(texts: Path, options: dict[str, str]) -> None:
    seen = []
    for settings in ({}, options):
        losses = Losses()
        module = make_module(**{k: v for k, v in settings.items() if k == "dtype"})
        precision = settings.get("precision", "32-true")
        trainer = make_trainer(max_steps=8, precision=precision, callbacks=[losses])
        trainer.fit(module, datamodule=make_data(texts))
        assert all(weight.dtype == torch.float32 for weight in module.net.parameters())
        seen.append(losses.values)
        stored = module.banks["train"].memories[1].keys.dtype
        assert stored == (torch.bfloat16 if "dtype" in settings else torch.float32)
    assert seen[1] != seen[0]
    assert seen[1] == pytest.approx(seen[0], rel=0.02)


class Poison(Callback):
    """Spoils the weights before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == self.step:
            module.net.norm.weight.data.fill_(torch.nan)


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_try(texts: Path) -> None:
    module = make_module()
    trainer = make_trainer(callbacks=[Poison(3)])
    with pytest.raises(UserError) as caught:
        trainer.fit(module, datamodule=make_data(texts))
    message = str(caught.value)
    assert message.startswith("train/loss = nan at step 3: try a lower model.optimizer.lr")
    assert "(now 0.01)" in message
    assert "trainer.gradient_clip_val" in message
    # The memory was not written with it.
    assert torch.isfinite(module.banks["train"].memories[1].keys).all()


def test_the_vocabulary_is_the_tokenizers_unless_it_is_larger(texts: Path) -> None:
    for given, expected in ((None, 256), (256, 256), (300, 300)):
        module = make_module(vocab_size=given)
        make_trainer(max_steps=1).fit(module, datamodule=make_data(texts))
        assert module.net.embedding.num_embeddings == expected
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 200: must be at least 256"):
        make_trainer().fit(make_module(vocab_size=200), datamodule=make_data(texts))


def test_training_learns(texts: Path) -> None:
    losses = Losses()
    module = make_module()
    make_trainer(max_steps=40, callbacks=[losses]).fit(module, datamodule=make_data(texts))
    assert losses.values[0] > 5.0
    assert sum(losses.values[-4:]) / 4 < 3.0
