"""Losses from hidden states against those from logits: values, gradients, hits and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import VOCAB, random_tokens, read, small_model
from peak import Peak
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memorizing_transformers.model import Transformer
from memorizing_transformers.model import forecast as forecasting
from memorizing_transformers.model.forecast import chunk_tokens, forecast

ROWS, COUNT, WIDTH = 2, 9, 8


@pytest.fixture(params=[1, 4, 18], ids="{0} at a time".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens whose logits exist at once; 18 are all."""
    monkeypatch.setattr(forecasting, "CHUNK", request.param * VOCAB)
    return int(request.param)


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "hidden": torch.randn(ROWS, COUNT, WIDTH, generator=generator),
        "weight": torch.randn(VOCAB, WIDTH, generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def some_targets() -> Tensor:
    targets = random_tokens(ROWS, COUNT, seed=3)
    targets[0, :2] = targets[1, 5] = -100
    return targets


def by_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses and logits by definition."""
    logits = F.linear(hidden, weight, bias).float()
    logits = F.linear(hidden, weight, bias) if hidden.dtype == torch.float64 else logits
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"), logits


@pytest.mark.parametrize("cap", [None, 2.0], ids=["", "capped"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_it_is_the_cross_entropy(chunk: int, biased: bool, cap: float | None) -> None:
    targets, upstream = some_targets(), torch.randn(ROWS, COUNT, dtype=torch.float64)
    candidates = torch.randint(0, VOCAB, (ROWS, COUNT, 3))
    results = []
    for fast in (True, False):
        x = given()
        bias = x["bias"] if biased else None
        if fast:
            found = forecast(x["hidden"], x["weight"], targets, candidates, bias, cap)
            nll = found.nll
        else:
            flat, logits = by_logits(x["hidden"], x["weight"], targets, bias, cap)
            nll = flat.view(targets.shape)
        (nll * upstream).sum().backward()
        results.append([nll, *(t.grad for t in x.values() if t.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    log_p = logits.log_softmax(-1)
    assert not found.nll[targets == -100].any()
    assert torch.equal(found.best, logits.argmax(-1))
    torch.testing.assert_close(found.best_log_p, log_p.amax(-1))
    torch.testing.assert_close(found.log_p, log_p.gather(-1, candidates))
    assert found.log_p is not None
    assert not found.log_p.requires_grad
    assert not found.best_log_p.requires_grad


def test_the_backward_pass_can_run_twice(chunk: int) -> None:
    x = given()
    loss = forecast(x["hidden"], x["weight"], some_targets()).nll.sum()
    first, second = (
        torch.autograd.grad(loss, [x["hidden"], x["weight"]], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("learned", ["hidden", "weight", "bias"])
def test_only_what_learns_gets_a_gradient(chunk: int, learned: str) -> None:
    expected, x = given(), given()
    for name, value in x.items():
        value.requires_grad_(name == learned)
    for values in (expected, x):
        nll = forecast(values["hidden"], values["weight"], some_targets(), bias=values["bias"]).nll
        nll.sum().backward()
    assert [name for name, value in x.items() if value.grad is not None] == [learned]
    torch.testing.assert_close(x[learned].grad, expected[learned].grad)


def autocast_gradients(fast: bool, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, 32, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 32, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCAB, (1, tokens), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        if fast:
            nll = forecast(hidden, weight, targets).nll
        else:
            nll = by_logits(hidden, weight, targets, None, None)[0].view(targets.shape)
    assert nll.dtype == torch.float32
    nll.sum().backward()
    return [nll.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]


def test_autocast_is_as_exact_as_with_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of chunks are added up in fp32: in bf16 each sum would round."""
    tokens = 512
    slow = autocast_gradients(False, tokens)
    for size in (tokens, 2):
        monkeypatch.setattr(forecasting, "CHUNK", size * VOCAB)
        nll, hidden, weight = autocast_gradients(True, tokens)
        assert torch.equal(nll, slow[0])
        torch.testing.assert_close(hidden, slow[1], atol=2e-2, rtol=2e-2)
        scale = slow[2].abs().max()
        assert (weight - slow[2]).abs().max() < 4e-3 * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_does_not_round_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "CHUNK", 4 * VOCAB)
    x = {name: value.detach().to("cuda", dtype) for name, value in given().items()}
    own, exact = (
        {n: v.detach().to(t, copy=True).requires_grad_() for n, v in x.items()}
        for t in (dtype, torch.double)
    )
    targets = some_targets().cuda()
    found, expected = (forecast(one["hidden"], one["weight"], targets).nll for one in (own, exact))
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    for nll in (found, expected):
        nll.sum().backward()
    for name in ("hidden", "weight"):
        one, other = own[name].grad, exact[name].grad
        assert one is not None
        torch.testing.assert_close(one.double(), other, atol=0.02, rtol=0.02)


def test_chunks_are_alike_and_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "CHUNK", 1000)
    assert chunk_tokens(100, 10) == 100  # all at once
    assert chunk_tokens(101, 10) == 51  # not 100 and 1
    assert chunk_tokens(5, 10**6) == 1
    assert chunk_tokens(0, 10) == 0


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class Largest(TorchDispatchMode):
    """The largest floating tensor that is made, in numbers."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_float(x)}
        for x in tree_leaves(made):
            if is_float(x) and x.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return made


def test_memory_is_less_than_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, width = 1024, 4096, 16
    monkeypatch.setattr(forecasting, "CHUNK", 2**16)
    peaks = []
    for fast in (True, False):
        hidden = torch.randn(1, tokens, width, requires_grad=True)
        weight = torch.randn(vocabulary, width, requires_grad=True)
        targets = torch.randint(0, vocabulary, (1, tokens))
        with Peak() as peak:
            if fast:
                forecast(hidden, weight, targets).nll.sum().backward()
            else:
                by_logits(hidden, weight, targets, None, None)[0].sum().backward()
        peaks.append(peak.most)
    assert peaks[0] < peaks[1] / 16


def test_a_frozen_head_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, width = 64, 128
    monkeypatch.setattr(forecasting, "CHUNK", 2 * vocabulary)
    hidden = torch.randn(1, 8, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    nll = forecast(hidden, weight, torch.zeros(1, 8, dtype=torch.int64)).nll
    with Largest() as largest:
        nll.sum().backward()
    assert 0 < largest.most < vocabulary * width


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"xl_cache": 4},
    "without memory": {"size": 0},
    "neighbours": {"copy": ["neighbours"], "size": 64},
    "copies": {"copy": ["neighbours", "repeats"], "size": 64, "copy_init": 0.3},
    "recomputed": {"copy": ["repeats"], "size": 64, "activation_checkpointing": True},
}


def losses(model: Transformer, fast: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Losses, hits, weights of copies and gradients of the last of some segments."""
    tokens = random_tokens(3, 12).repeat(1, 2)
    bank = model.new_memory(3)
    read(model, bank, tokens[:, :18], 6)
    bank.reset(torch.tensor([False, True, False]))
    ids, targets = tokens[:, 18:], tokens[:, 18:].roll(-1, 1)
    targets[:, -1] = -100
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        if fast:
            output = model.score(ids, bank, targets)
            assert output.logits is None
            nll, hits = output.nll, output.hits
        else:
            output = model(ids, bank)
            nll = model.loss(output.logits, targets, "none")
            hits = output.logits.argmax(-1) == targets
    nll.sum().backward()
    copied = torch.zeros(()) if output.copied is None else output.copied
    return [nll, hits, copied, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("settings", MODELS.values(), ids=[*MODELS])
def test_a_model_scores_what_its_logits_say(chunk: int, settings: dict[str, Any]) -> None:
    """The embedding is input and output, so its gradient has two parts."""
    model = small_model(**settings)
    fast, slow = (losses(model, fast) for fast in (True, False))
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", MODELS.values(), ids=[*MODELS])
def test_a_model_under_autocast_is_as_near_to_fp32(settings: dict[str, Any]) -> None:
    """As with logits of the mixture, which are in bf16."""
    model = small_model(**settings)
    exact, fast, slow = (
        losses(model, *how) for how in ((False,), (True, torch.bfloat16), (False, torch.bfloat16))
    )
    assert fast[0].dtype == torch.float32
    errors = [(x[0] - exact[0]).abs().mean().item() for x in (fast, slow)]
    assert errors[0] < 1.1 * errors[1] < 0.1


@pytest.mark.parametrize("copy", [[], ["neighbours", "repeats"]], ids=["plain", "copies"])
def test_no_logits_of_all_tokens_exist(copy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens = 3000, 32
    monkeypatch.setattr(forecasting, "CHUNK", 4 * vocabulary)
    model = small_model(vocab_size=vocabulary, copy=copy, size=32, d_model=8, head_dim=4)
    bank, ids = model.new_memory(2), random_tokens(2, tokens)
    bank.commit(model(ids, bank).pairs, None, ids)
    with Largest() as largest:
        model.score(ids, bank, ids).nll.mean().backward()
    # Of the vocabulary there are the embedding and a few tokens' logits.
    assert 4 * vocabulary <= largest.most <= 8 * vocabulary
    with Largest() as largest:
        model.loss(model(ids, bank).logits, ids).backward()
    assert largest.most >= 2 * tokens * vocabulary
