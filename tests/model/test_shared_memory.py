"""A memory that was read once serves many rows: a model reads it through a view."""

from __future__ import annotations

import pytest
import torch
from build import random_tokens, small_model

from memorizing_transformers.memory import MemoryBank, MemoryView


@pytest.mark.parametrize("settings", [{}, {"combine": "joint", "position_bias": "t5"}])
def test_prompts_that_share_a_memory_are_as_each_with_its_own(settings: dict) -> None:
    model = small_model(size=30, **settings).eval()
    document, prompts = random_tokens(1, 20), random_tokens(3, 6, seed=1)
    read = model.new_memory(1)
    for ids in document.split(5, dim=1):
        read.commit(model(ids, read).pairs)
    shared = {layer: MemoryView(memory, [0, 0, 0]) for layer, memory in read.memories.items()}
    together = model(prompts, MemoryBank(3, shared)).logits
    alone = [model(prompt[None], MemoryBank(1, read.memories)).logits for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together, model(prompts).logits)
