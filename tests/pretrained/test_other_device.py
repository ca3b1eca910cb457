"""A pretrained model on a pretended device, its memory there or on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny
from test_memorize import N, read
from torch import Tensor
from two_devices import AWAY, CPU, Away, send_away, two_devices

from memorizing_transformers import memorize
from memorizing_transformers.pretrained.memorized import MemorizedModel


def made(family: str, place: str) -> MemorizedModel:
    memory = {"size": 32, "top_k": 4, "combine": "joint", "device": place, "search": "exact"}
    base = tiny(family, tie_word_embeddings=False)  # tied ones part on their way
    return memorize(base, memory, layers=[1], xl_cache=8)


def numbers(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Away) else tensor


@pytest.mark.parametrize("place", ["model", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen3"])
def test_it_reads_the_same_and_mixes_nothing(family: str, place: str) -> None:
    assert family in FAMILIES
    ids = torch.randint(VOCABULARY, (2, 5 * N), generator=torch.Generator().manual_seed(0))
    expected = read(made(family, place), ids)
    model = made(family, place)
    with two_devices("cuda"):
        send_away(model)
        found = read(model, ids.to(AWAY))
        kept = {memory.device for memory in model.new_memory(2).memories.values()}
    assert kept == {AWAY if place == "model" else CPU}
    torch.testing.assert_close(numbers(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["model", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_the_same_and_mix_nothing(family: str, place: str) -> None:
    ids = torch.randint(VOCABULARY, (2, 3 * N), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Tensor]] = []
    for away in (False, True):
        model = made(family, place)
        with two_devices("cuda") if away else nullcontext():
            if away:
                send_away(model)
            bank = model.new_memory(2)
            for part in (ids.to(AWAY) if away else ids).split(N, 1):
                output = model(part, bank)
                output.logits.float().square().mean().backward()
                bank.commit(output.pairs, token_ids=part)
        named = model.named_parameters()
        found.append({name: numbers(x.grad) for name, x in named if x.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("memory" in name or "gate" in name for name in found[0]), [*found[0]]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
