"""Metrics against sums in fp64, over counted tokens alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from memorizing_transformers.training.metrics import Perplexity, language_model_metrics


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
