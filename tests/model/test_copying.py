"""The copy head's mixture against its definition, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import VOCAB, random_tokens, small_model
from torch import Tensor

from memorizing_transformers.model import GATES, ModelConfig, copying, mixing
from memorizing_transformers.model.config import COPY_NAMES
from memorizing_transformers.model.copying import COPIES, sum_by_token
from memorizing_transformers.model.mixing import _MixIn, log_total


def candidates(seed: int, places: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 3, V), tokens (2, 3, places) with some twice, and odds of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, VOCAB, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 5, (2, 3, places), generator=generator)
    odds = torch.rand(2, 3, places, generator=generator, dtype=torch.float64)
    return logits, tokens, odds * (odds > 0.3)


def mixture(logits: Tensor, tokens: Tensor, odds: Tensor) -> Tensor:
    """The probabilities by definition."""
    total = logits.softmax(-1).scatter_add(-1, tokens, odds)
    return total / total.sum(-1, keepdim=True)


def mixed(logits: Tensor, tokens: Tensor, odds: Tensor) -> Tensor:
    """Logits as the copy head makes them."""
    sums, once = sum_by_token(tokens, odds, logits.shape[-1])
    log_odds = sums.clamp(min=1e-30).log().masked_fill((sums == 0) | ~once, -torch.inf)
    out: Tensor = _MixIn.apply(logits * 1.0, tokens, log_odds, log_total(logits))
    return out


@pytest.fixture(params=[64, 2])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that are read in one piece, and in two."""
    monkeypatch.setattr(mixing, "CHUNK", request.param)


@pytest.fixture(params=[1000, 0], ids=["table", "sorted"])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by a table of the vocabulary, and by sorting."""
    monkeypatch.setattr(copying, "DENSE", request.param)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_mixture_and_sums_to_one(seed: int, chunk: None, dense: None) -> None:
    logits, tokens, odds = candidates(seed)
    found = mixed(logits, tokens, odds).softmax(-1)
    torch.testing.assert_close(found, mixture(logits, tokens, odds))
    # Against the model's own normaliser too: what is added is exactly the odds.
    raw = (mixed(logits, tokens, odds) - logits.logsumexp(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(raw, 1 + odds.sum(-1))


def test_its_gradients_are_those_of_the_definition(chunk: None, dense: None) -> None:
    logits, tokens, odds = candidates(0)
    upstream = torch.randn(2, 3, VOCAB, dtype=torch.float64)
    gradients = []
    for function in (lambda *x: mixed(*x).log_softmax(-1), lambda *x: mixture(*x).log()):
        given = logits.clone().requires_grad_(), tokens, odds.clone().requires_grad_()
        loss = (function(*given) * upstream).sum()
        gradients.append(torch.autograd.grad(loss, [given[0], given[2]]))
    known = odds > 0
    for fast, slow in zip(*gradients, strict=True):
        counted = known if fast.shape == odds.shape else torch.ones_like(fast, dtype=torch.bool)
        torch.testing.assert_close(fast[counted], slow[counted])


def test_gradients_keep_their_digits_where_a_copy_is_all_but_certain() -> None:
    logits, tokens, odds = candidates(0)
    upstream = torch.randn(2, 3, VOCAB, dtype=torch.float64)
    gradients = []
    for kind in (torch.float32, torch.float64):
        given = logits.to(kind).requires_grad_()
        # The logits themselves, since a softmax would leave no gradient to compare.
        loss = (mixed(given, tokens, 1e6 * odds.to(kind)) * upstream.to(kind)).sum()
        gradients.append(torch.autograd.grad(loss, given)[0].double())
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-6)


def test_bf16_logits_stay_near(chunk: None) -> None:
    logits, tokens, odds = (x.float() if x.is_floating_point() else x for x in candidates(1))
    found = mixed(logits.bfloat16(), tokens, odds)
    assert found.dtype == torch.bfloat16
    expected = mixture(logits.bfloat16().float(), tokens, odds)
    torch.testing.assert_close(found.float().softmax(-1), expected, atol=0.01, rtol=0.05)


def test_no_candidate_changes_nothing() -> None:
    logits, tokens, odds = candidates(0)
    assert torch.equal(mixed(logits, tokens, odds * 0), logits)


def test_each_token_has_its_sum_once(dense: None) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (2, 3, 9), generator=generator)
    weights = torch.rand(2, 3, 9, generator=generator)
    sums, once = sum_by_token(tokens, weights, 6)
    for row in range(2):
        for place in range(3):
            given, share = tokens[row, place], weights[row, place]
            counted = once[row, place]
            assert sorted(given[counted].tolist()) == sorted({*given.tolist()})
            for token, total in zip(given, sums[row, place], strict=True):
                assert total == pytest.approx(share[given == token].sum())


def test_every_name_has_a_class() -> None:
    assert {*COPIES} == {*COPY_NAMES}
    assert not ModelConfig(vocab_size=5).memory.copy  # the paper has none


@pytest.mark.parametrize("source", COPY_NAMES)
def test_probabilities_sum_to_one_and_move_toward_what_is_copied(source: str) -> None:
    plain, copying = (small_model(size=64, copy=copy) for copy in ([], [source]))
    copying.load_state_dict(plain.state_dict(), strict=False)
    tokens = random_tokens(2, 8).repeat(1, 2)
    losses, plain_forecast = [], torch.zeros(2, 8, VOCAB)
    for model in (plain, copying):
        bank = model.new_memory(2)
        for ids in tokens.split(8, dim=1):
            output = model(ids, bank)
            bank.commit(output.pairs, None, ids)
        if model is copying:
            torch.testing.assert_close(
                output.logits.log_softmax(-1).exp().sum(-1), torch.ones(2, 8)
            )
            # What is no copy is the model's own: nothing is below its part of the mixture.
            own = (1 - output.copied[..., None]) * plain_forecast
            assert (output.logits.softmax(-1) >= own - 1e-5).all()
            assert ((output.copied >= 0) & (output.copied < 1)).all()
            assert output.copied.any()
        plain_forecast = output.logits.softmax(-1)
        losses.append(model.loss(output.logits[:, 2:-1], tokens[:, 11:]).item())
    if source == "repeats":
        assert losses[1] < losses[0]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("source", COPY_NAMES)
def test_odds_that_no_float_holds_give_numbers(source: str) -> None:
    model = small_model(size=64, copy=[source])
    with torch.no_grad():
        model.copy_head.sources[source].log_odds.fill_(200.0)
    bank, first = model.new_memory(2), random_tokens(2, 8)
    bank.commit(model(first, bank).pairs, None, first)
    targets = first.roll(-1, 1)
    output = model.score(first, bank, targets)
    output.nll.sum().backward()
    assert output.nll.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    logits = model(first, bank).logits
    torch.testing.assert_close(model.loss(logits, targets, reduction="none"), output.nll)


def test_the_loss_teaches_queries_what_to_copy() -> None:
    """Though the gate is shut, so that no gradient comes through the layer's output."""
    model = small_model(combine="fixed", fixed_value=0.0, copy=["neighbours"])
    bank = model.new_memory(2)
    first, second = random_tokens(2, 10).split(5, dim=1)
    bank.commit(model(first, bank).pairs, None, first)
    logits = model(second, bank).logits
    gradients = []
    for value in (logits, model(second).logits):
        (gradient,) = torch.autograd.grad(
            model.loss(value, second), model.layers[1].attention.scale, retain_graph=True
        )
        gradients.append(gradient)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize(
    "reads", [{"copy": ["neighbours"]}, {"copy": ["repeats"]}, {"match_length": 2}]
)
def test_tokens_that_will_be_read_must_be_written(reads: dict[str, Any]) -> None:
    model, ids = small_model(**reads), random_tokens(2, 4)
    for size in (None, 0):
        bank = model.new_memory(2, size=size).take([1, 0])
        bank.own()
        pairs = model(ids, bank).pairs
        if size is None:
            with pytest.raises(ValueError, match=r"^token_ids = None: .*token_ids=") as caught:
                bank.commit(pairs)
            assert "\n" not in str(caught.value)
        else:
            bank.commit(pairs)
        bank.commit(pairs, token_ids=ids)
    plain = small_model()
    bank = plain.new_memory(2)
    bank.commit(plain(ids, bank).pairs)


OPTIONS: list[dict[str, Any]] = [
    *({"combine": combine} for combine in GATES),
    *({"position_bias": bias} for bias in ("none", "log", "t5", "learned-absolute")),
    {"copy": list(COPY_NAMES), "temperature": True, "match_length": 4},
    {"value_residual": True, "embedding_shortcut": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_has_a_dimension(options: dict[str, Any]) -> None:
    """FSDP2 shards no parameter without."""
    for name, parameter in small_model(size=64, **options).named_parameters():
        assert parameter.ndim > 0, name


def test_weights_of_a_version_with_numbers_of_no_dimension_load() -> None:
    model, other = (small_model(size=64, copy=list(COPY_NAMES)) for _ in range(2))
    old = {
        name: tensor.squeeze() if name.endswith((".slope", ".toward_likely")) else tensor + 1
        for name, tensor in model.state_dict().items()
    }
    assert old["copy_head.sources.repeats.slope"].ndim == 0
    other.load_state_dict(old)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor.reshape(old[name].shape), old[name]), name
