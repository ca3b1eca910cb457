"""The probe finds the heads that attend to what followed the same token before."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

from memorizing_transformers import memorize
from memorizing_transformers.pretrained import induction


def test_a_head_is_measured_by_the_token_after_the_earlier_one() -> None:
    count = 6
    key = torch.eye(2 * count)[None, None]
    # Head 0 looks for token i + 1 of the first time, head 1 for token i, head 2 for all alike.
    ahead = torch.eye(2 * count).roll(1, 1)
    query = torch.stack([ahead, torch.eye(2 * count), torch.zeros(2 * count, 2 * count)])[None]
    query = torch.cat([query[:, :, :count], query[:, :, :count]], dim=2) * 100
    found = induction.attention_ahead(query, key, 1.0, None)
    ahead_head, same_head, even_head = found.tolist()
    assert ahead_head == pytest.approx(1.0, abs=1e-4)
    assert same_head == pytest.approx(0.0, abs=1e-4)
    assert 0.08 < even_head < 0.15


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_probe_leaves_the_model_as_it_was(family: str) -> None:
    model, ids = tiny(family), torch.arange(10)[None]
    before = model(ids).logits
    scores = induction.induction_scores(model)
    assert sorted(scores) == [0, 1]
    assert all(values.shape == (4,) for values in scores.values())
    assert torch.equal(model(ids).logits, before)


def test_auto_takes_the_layers_above_the_bound_and_prints_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {0: torch.tensor([0.1, 0.2]), 1: torch.tensor([0.3, 0.0]), 2: torch.tensor([0.0, 0.9])}
    monkeypatch.setattr(induction, "induction_scores", lambda model: found)
    assert memorize(tiny("llama", layers=3), {"size": 32}).memory_layers == (1, 2)
    assert "0.90" in capsys.readouterr().out
    assert induction.induction_layers(nn.Module(), least=0.95, show=False) == [2]
