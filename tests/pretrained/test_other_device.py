"""A pretrained model on a pretended device, its memory there or on the CPU."""

from __future__ import annotations

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
    return memorize(tiny(family), memory, layers=[1], xl_cache=8)


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
