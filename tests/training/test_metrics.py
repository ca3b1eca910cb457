"""Metrics against sums in fp64, over counted tokens alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small import make_data, make_module, make_trainer
from torch import Tensor
from two_devices import AWAY, Away, two_devices

from memorizing_transformers.data import batch as batches
from memorizing_transformers.data.batch import Batch
from memorizing_transformers.training.metrics import Perplexity, language_model_metrics
from memorizing_transformers.training.module import MemorizingLM


class Tokens(NamedTuple):
    """A batch as the metrics get it."""

    nll: Tensor
    correct: Tensor
    mask: Tensor
    num_bytes: Tensor


def draw(rows: int = 6, segment: int = 10) -> Tokens:
    """Rows padded at the right, the last one idle."""
    counts = torch.tensor([segment, 1, 7, segment, 3, 0])[:rows]
    mask = torch.arange(segment) < counts[:, None]
    # Where nothing counts the loss is 0, as cross-entropy gives it.
    nll = (4 * torch.rand(rows, segment)).masked_fill(~mask, 0.0)
    return Tokens(nll, torch.rand(rows, segment) < 0.4, mask, 2.5 * counts.double())


def compute(batches: list[Tokens]) -> dict[str, float]:
    metrics = language_model_metrics("val/")
    for batch in batches:
        metrics.update(*batch)
    return {name: value.item() for name, value in metrics.compute().items()}


def test_figures_equal_sums_over_counted_tokens() -> None:
    batch = draw()
    counted = batch.nll[batch.mask].double()
    hits = batch.correct[batch.mask].double()
    expected = {
        "val/loss": counted.mean().item(),
        "val/perplexity": math.exp(counted.mean().item()),
        "val/bits_per_byte": counted.sum().item() / math.log(2) / batch.num_bytes.sum().item(),
        "val/accuracy": hits.mean().item(),
    }
    assert compute([batch]) == pytest.approx(expected, rel=1e-6)


def test_hits_on_padding_do_not_count() -> None:
    batch = draw()
    everywhere = batch._replace(correct=batch.correct | ~batch.mask)
    assert compute([everywhere]) == compute([batch])


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
def test_batches_add_up_however_they_are_cut(pieces: int) -> None:
    batch = draw()
    cut = [Tokens(*parts) for parts in zip(*(x.chunk(pieces) for x in batch), strict=True)]
    assert len(cut) == pieces
    assert compute(cut) == pytest.approx(compute([batch]), rel=1e-6)


def test_a_mean_of_batch_means_would_differ() -> None:
    batch = draw()
    rows = [Tokens(*(x[[row]] for x in batch)) for row in range(5)]
    means = [compute([row])["val/loss"] for row in rows]
    assert compute(rows)["val/loss"] != pytest.approx(sum(means) / 5, rel=1e-3)


def test_long_sums_do_not_stall() -> None:
    # In fp32 a sum of 2**24 takes no further 1.
    metric = Perplexity()
    large, small = torch.tensor(2.0**24), torch.tensor(1.0)
    metric.add(large, large)
    for _ in range(8):
        metric.add(small, small)
    assert metric.weight.item() == 2**24 + 8


def test_a_reset_forgets() -> None:
    one, other = draw(), draw()
    metrics = language_model_metrics("val/")
    metrics.update(*one)
    metrics.reset()
    metrics.update(*other)
    after = {name: value.item() for name, value in metrics.compute().items()}
    assert after == compute([other]) != compute([one, other])


@pytest.mark.parametrize(
    "convert",
    [
        lambda metrics: metrics.to(torch.bfloat16),
        lambda metrics: metrics.to("cpu", torch.float16),
        lambda metrics: metrics.half(),
        lambda metrics: metrics.bfloat16().float(),
        lambda metrics: metrics.set_dtype(torch.float64).to(torch.bfloat16),
    ],
)
def test_sums_keep_their_dtype_whatever_the_module_is_converted_to(convert: Any) -> None:
    metrics = language_model_metrics("val/")
    convert(metrics)
    drawn = [draw() for _ in range(400)]
    for batch in drawn:
        metrics.update(*batch)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == compute(drawn)
    metrics.reset()
    assert all(metric.total.dtype == torch.float64 for metric in metrics.values())


class Sums(MemorizingLM):
    """Adds up by hand, in plain Python, what a split's figures are made of."""

    batches, nll, hits, tokens, num_bytes = 0, 0.0, 0, 0, 0.0

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().validation_step(batch, batch_idx)
        self.nll += math.fsum(outputs["nll"].double().flatten().tolist())
        store = self.trainer.datamodule.validation_store
        for row, document in enumerate(batch.document.tolist()):
            counted = int(batch.mask[row].sum())
            self.tokens += counted
            if document >= 0:
                self.num_bytes += store.num_bytes[document] * counted / store.lengths[document]
        self.batches += 1
        return outputs


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_figures_are_exact_in_every_precision(precision: Any, texts: Path) -> None:
    module = make_module(Sums)
    data = make_data(texts, segment_length=2, eval_rows=1, tokenizer="bpe", bpe_vocab_size=280)
    trainer = make_trainer(limit_val_batches=1.0, precision=precision)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    assert module.batches > 300
    assert found["val/loss"] == pytest.approx(module.nll / module.tokens, rel=1e-6)
    bits = module.nll / math.log(2) / module.num_bytes
    assert found["val/bits_per_byte"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("lacks", [False, True])
def test_sums_stay_on_the_cpu_where_the_device_has_no_fp64(
    lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = draw()
    counts = real.mask.sum(1)
    with two_devices(), monkeypatch.context() as patch:
        if lacks:
            patch.setattr(batches, "WITHOUT_FP64", batches.WITHOUT_FP64 | {AWAY.type})
        metrics = language_model_metrics("val/")
        nll, correct, mask = (Away(x.clone()) for x in real[:3])
        targets = mask.long() - 1
        targets = targets.masked_fill(~mask, -100)
        zeros = Away(torch.zeros_like(counts))
        sizes = Away(5 * torch.ones_like(counts)), Away(2 * torch.ones_like(counts))
        batch = Batch(targets, targets, zeros.bool(), zeros, zeros, *sizes)
        for metric in metrics.values():
            metric._apply(lambda tensor: Away(tensor) if not isinstance(tensor, Away) else tensor)
        place = torch.device("cpu") if lacks else AWAY
        assert batch.num_bytes.device == place
        assert batch.num_bytes.dtype == torch.float64
        metrics.update(nll, correct, batch.mask, batch.num_bytes)
        assert {metric.total.device for metric in metrics.values()} == {place}
        found = {name: value.tolist() for name, value in metrics.compute().items()}
    assert found == pytest.approx(compute([real]))
