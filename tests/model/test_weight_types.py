"""Every option of the memory works with weights that are not fp32, and means the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import random_tokens, small_model
from torch import Tensor

from memorizing_transformers.model import Transformer

OPTIONS: dict[str, dict[str, Any]] = {
    "neighbours": {"copy": ["neighbours"]},
    "repeats": {"copy": ["repeats"]},
    "both copies": {"copy": ["neighbours", "repeats"], "combine": "evidence"},
    "evidence": {"combine": "evidence", "match_length": 3},
    "joint-bias": {"combine": "joint-bias"},
    "temperature": {"temperature": True},
    "t5": {"position_bias": "t5", "candidates": 2},
    "learned-absolute": {"position_bias": "learned-absolute"},
    "log": {"position_bias": "log", "candidates": 2},
    "matches": {"match_length": 3, "candidates": 2, "position_bias": "t5"},
}
NEAR = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}
"""How far a loss may be from that of the same weights in fp32."""


def losses(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of the second of two segments, from the logits and without them: in fp64."""
    bank = model.new_memory(2)
    first, second = tokens.split(8, dim=1)
    output = model(first[:, :-1], bank)
    model.loss(output.logits, first[:, 1:]).backward()
    bank.commit(output.pairs, None, first[:, :-1])
    ids, targets = second[:, :-1], second[:, 1:]
    output = model(ids, bank)
    by_logits = model.loss(output.logits, targets)
    by_score = model.score(ids, bank, targets).nll.mean()
    (by_logits + by_score).backward()
    bank.commit(output.pairs, None, ids)
    return by_logits.detach().double(), by_score.detach().double()


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_weights_of_any_type_read_and_learn(options: dict[str, Any], dtype: torch.dtype) -> None:
    tokens = random_tokens(2, 8).repeat(1, 2)
    model = small_model(size=20, **options).to(dtype)
    twin = small_model(size=20, **options)
    twin.load_state_dict(model.state_dict())
    expected = losses(twin, tokens)
    torch.testing.assert_close(losses(model, tokens), expected, rtol=0, atol=NEAR[dtype])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, own in twin.named_parameters():
        assert (gradients[name] is None) == (own.grad is None), name
    assert all(g is None or (g.dtype == dtype and g.isfinite().all()) for g in gradients.values())
