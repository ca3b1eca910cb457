"""Losses of pretrained models from hidden states against those from their own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny
from peak import Peak
from torch import Tensor, nn

from memorizing_transformers import memorize
from memorizing_transformers.model import forecast as forecasting
from memorizing_transformers.pretrained.head import OutputHead
from memorizing_transformers.pretrained.memorized import MemorizedModel

ALL = [*FAMILIES, "gpt2"]
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 6.0},
    "llama": {"tie_word_embeddings": True},
}
"""What changes logits, of the families that have it."""


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of five tokens at a time."""
    monkeypatch.setattr(forecasting, "CHUNK", 5 * VOCABULARY)


def memorized(family: str, **settings: Any) -> MemorizedModel:
    base = tiny(family, **{**SETTINGS.get(family, {}), **settings})
    return memorize(base, {"size": 32, "top_k": 4}, layers=[1], xl_cache=8)


def results(model: MemorizedModel, fast: bool, memory: bool = True) -> list[Tensor]:
    """Losses and hits of a second segment, and all gradients."""
    generator = torch.Generator().manual_seed(0)
    first, ids = torch.randint(VOCABULARY, (2, 2, 8), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    bank = model.new_memory(2) if memory else None
    if bank is not None:
        bank.commit(model(first, bank).pairs)
    model.zero_grad()
    if fast:
        output = model.score(ids, bank, targets)
        assert output.logits is None
        nll, hits = output.nll, output.hits
    else:
        logits = model(ids, bank).logits
        nll, hits = model.loss(logits, targets, "none"), logits.argmax(-1) == targets
    assert nll is not None
    assert hits is not None
    nll.mean().backward()
    return [nll, hits, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_alike(model: MemorizedModel, memory: bool = True) -> None:
    fast, slow = (results(model, fast, memory) for fast in (True, False))
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("memory", [True, False], ids=["", "without memory"])
@pytest.mark.parametrize("family", ALL)
def test_losses_and_gradients_are_those_of_its_logits(family: str, memory: bool) -> None:
    model = memorized(family)
    assert model._head.known
    assert_alike(model, memory)


def test_recomputed_activations_change_nothing() -> None:
    model = memorized("llama")
    model.base.activation_checkpointing_enable()  # type: ignore[operator]
    assert_alike(model.train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_bases_in_half_precision_are_known_too(family: str, dtype: torch.dtype) -> None:
    base: Any = tiny(family, **SETTINGS.get(family, {})).to(dtype)
    assert OutputHead(base, VOCABULARY, 12).known
    multiply_logits(base, 1.1)
    assert not OutputHead(base, VOCABULARY, 12).known


def multiply_logits(base: Any, factor: float) -> None:
    """As a family may do that nobody has told us of."""
    forward = base.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = factor * output.logits
        return output

    base.forward = other


class Doubled(nn.Linear):
    """A head that an adapter changed."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("changed", ["head", "logits"])
def test_what_is_not_known_is_computed_by_the_model_itself(changed: str) -> None:
    base: Any = tiny("llama")
    if changed == "head":
        head = Doubled(32, VOCABULARY, bias=False)
        head.weight = base.lm_head.weight
        base.lm_head = head
    else:
        multiply_logits(base, 1.02)
    model = memorize(base, {"size": 32, "top_k": 4}, layers=[1], xl_cache=8)
    assert not model._head.known
    assert_alike(model)


def test_a_head_that_is_replaced_later_is_noticed() -> None:
    model = memorized("qwen2")
    head = Doubled(32, VOCABULARY, bias=False)
    head.weight = model.base.lm_head.weight
    model.base.lm_head = head
    assert_alike(model)


def test_trying_leaves_modes_as_they_were() -> None:
    base: Any = tiny("llama").train()
    base.model.layers[0].eval()
    OutputHead(base, VOCABULARY, 12)
    assert base.training
    assert not base.model.layers[0].training


def test_no_logits_of_all_tokens_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens = 4096, 128
    monkeypatch.setattr(forecasting, "CHUNK", 2 * vocabulary)
    base = tiny("llama", vocab_size=vocabulary)
    model = memorize(base, {"size": 8, "top_k": 4}, layers=[1])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.memory_parameters()[0].requires_grad_(True)
    ids, bank = torch.randint(vocabulary, (1, tokens)), model.new_memory(1)
    bank.commit(model(ids, bank).pairs)
    with Peak() as peak:
        output = model.score(ids, bank, ids)
        assert output.nll is not None
        output.nll.mean().backward()
    assert peak.most < tokens * vocabulary * 4 / 2
