"""Compiled dense parts: the same numbers, the same names, and nothing compiled twice."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from build import random_tokens, small_model
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What other tests compiled does not count here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(compiled: bool, steps: int, **settings: object) -> tuple[list[Tensor], list[int]]:
    """Losses and gradients of some steps over a memory that fills, and graphs so far."""
    model = small_model(size=40, compile=compiled, num_layers=3, xl_cache=5, **settings)
    bank, tokens = model.new_memory(2), random_tokens(2, 5 * steps + 1)
    results, counts = [], []
    for start in range(0, 5 * steps, 5):
        ids, targets = (tokens[:, start + shift : start + shift + 5] for shift in (0, 1))
        output = model.score(ids, bank, targets)
        bank.commit(output.pairs)
        model.zero_grad()
        assert output.nll is not None
        output.nll.mean().backward()
        results += [output.nll.detach(), *(p.grad for p in model.parameters())]
        counts.append(graphs())
        if start == 20:
            bank.reset(torch.tensor([True, False]))
    return results, counts


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_equal_numbers_and_nothing_compiled_again_as_the_memory_fills(recompute: bool) -> None:
    settings = {"activation_checkpointing": recompute, "layers": [0, 2]}
    plain, _ = train(False, 12, **settings)
    compiled, counts = train(True, 12, **settings)
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert 0 < counts[0] == counts[-1] <= 4


def test_names_of_weights_stay_and_a_copy_has_its_own() -> None:
    model = small_model(compile=True)
    assert model.state_dict().keys() == small_model().state_dict().keys()
    ids = random_tokens(1, 5)
    with torch.no_grad():
        before = model(ids).logits
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.zero_()
        assert not other(ids).logits.any()
        assert torch.equal(model(ids).logits, before)
