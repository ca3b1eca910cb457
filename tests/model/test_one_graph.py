"""A segment's forward pass is one graph, and gives what the plain one gives, to the last bit."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from build import VOCAB, random_tokens, small_model
from compiling import noted
from torch import Tensor

from memorizing_transformers.memory import lent
from memorizing_transformers.model import Transformer, compiled, forecast

COPIES = {"copy": ["neighbours", "repeats"], "xl_cache": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "no memory": {"size": 0, "layers": []},
    "XL cache only": {"size": 0, "layers": [], "xl_cache": 5},
    "paper": {"layers": [1], "combine": "gate", "position_bias": "none"},
    "paper, XL cache": {"layers": [1], "xl_cache": 5},
    "best": {"layers": [2], **COPIES},
    "evidence": {"layers": [2], "combine": "evidence", "match_length": 4, **COPIES},
    "two memories": {"layers": [0, 2], "xl_cache": 3, "candidates": 3, "position_bias": "t5"},
    "int8": {"layers": [1], "dtype": "int8", "combine": "joint"},
    "recomputed": {"layers": [1], "xl_cache": 5, "activation_checkpointing": True},
}
STEPS, SEGMENT = 7, 5


def train(model: Transformer, logits: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of some steps, and the bank: it fills, runs over, and forgets a row."""
    bank, tokens = model.new_memory(2), random_tokens(2, SEGMENT * STEPS + 1)
    results: list[Tensor] = []
    for step in range(STEPS):
        here = SEGMENT * step
        ids, targets = (tokens[:, here + i : here + i + SEGMENT] for i in (0, 1))
        if step == 4:
            bank.reset(torch.tensor([True, False]))
        if logits:
            output = model(ids, bank)
            nll = model.loss(output.logits, targets, reduction="none")
        else:
            output = model.score(ids, bank, targets)
            nll = output.nll
        mask = torch.ones(2, SEGMENT, dtype=torch.bool)
        mask[1, 3:] = step != 2
        bank.commit(output.pairs, mask, token_ids=ids, step=step)
        model.zero_grad()
        nll.mean().backward()
        results += [nll.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return results, bank.tensors()


@pytest.mark.parametrize("logits", [False, True], ids=["losses", "logits"])
@pytest.mark.parametrize("name", RECIPES)
def test_one_graph_with_equal_numbers(
    name: str, logits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"num_layers": 3, "size": 12, **RECIPES[name]}
    plain, bank = train(small_model(**settings), logits)
    with noted() as graphs:
        ours, own = train(small_model(compile=True, **settings), logits)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text
    assert len(graphs) == 1
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        if logits:  # outside a graph a mixture saves memory in its backward pass, and rounds more
            torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)
        else:
            assert torch.equal(one, other)
    for key, stored in bank.items():
        torch.testing.assert_close(own[key], stored)


def test_a_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "CHUNK", 4 * VOCAB)
    plain, _ = train(small_model(size=12, **COPIES))
    with noted() as graphs:
        ours, _ = train(small_model(size=12, compile=True, **COPIES))
    assert len(graphs) == 1
    assert all(map(torch.equal, ours, plain))


def test_late_backward_passes_read_what_was_read() -> None:
    """After all segments were written over what the first ones read, and in any order."""

    def gradients(model: Transformer, late: bool) -> list[Tensor]:
        bank, tokens = model.new_memory(2), random_tokens(2, 30)
        model.zero_grad()
        losses = []
        for ids in tokens.split(5, 1):
            output = model.score(ids, bank, ids)
            bank.commit(output.pairs, token_ids=ids)
            losses.append(output.nll.sum())
            if not late:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    settings = {"num_layers": 3, "size": 12, "layers": [0, 2], "position_bias": "t5", **COPIES}
    with noted():
        model = small_model(compile=True, **settings)
        late = [x.clone() for x in gradients(model, True)]
        for one, other in zip(late, gradients(model, False), strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(late, gradients(small_model(**settings), False), strict=True):
        torch.testing.assert_close(one, other)


def test_a_loan_ends_with_the_last_backward_pass_that_may_come() -> None:
    with noted():
        model = small_model(compile=True)
        bank, ids = model.new_memory(1), random_tokens(1, 5)
        bank.commit(model(ids, bank).pairs)
        gc.collect()
        before = len(lent._loans)
        output = model.score(ids, bank, ids)
        assert len(lent._loans) == before + 1
        loss = output.nll.sum()
        del output
        loss.backward()
        del loss
        gc.collect()
        assert len(lent._loans) == before


def test_what_cannot_be_one_graph_runs_in_parts_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Transformer._predict

    def broken(self: Transformer, *arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return real(self, *arguments)

    monkeypatch.setattr(Transformer, "_predict", broken)
    ids = random_tokens(2, 5)
    with noted() as graphs, torch.no_grad():
        model = small_model(compile=True)
        bank = model.new_memory(2)
        logits = model(ids, bank).logits
        model(ids, bank)
    said = [r.getMessage() for r in caplog.records if r.name == compiled.__name__]
    assert len(said) == 1
    assert "in parts" in said[0]
    assert len(graphs) == 3  # projections of two classes of attention, and the feed-forward part
    with torch.no_grad():
        plain = small_model()
        assert torch.equal(plain(ids, plain.new_memory(2)).logits, logits)


def test_too_many_shapes_run_in_parts_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with noted(), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        model, plain = small_model(compile=True), small_model()
        for rows, segment in ((2, 5), (3, 5), (1, 5), (2, 7), (1, 9)):
            ids = random_tokens(rows, segment)
            banks = model.new_memory(rows), plain.new_memory(rows)
            assert torch.equal(model(ids, banks[0]).logits, plain(ids, banks[1]).logits)
    said = [r.getMessage() for r in caplog.records if r.name == compiled.__name__]
    assert len(said) == 1, said
