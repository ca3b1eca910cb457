"""Compiled parts stay compiled, whatever shapes they meet; no C++ compiler needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import random_tokens, small_model
from compiling import noted

MODES = {
    "train": torch.enable_grad,
    "validate": torch.no_grad,
    "test": torch.inference_mode,
}


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """Every graph that was handed to a backend, which runs it as it is."""
    with noted() as made:
        yield made


def test_many_batch_sizes_need_few_graphs_and_none_runs_eagerly(graphs: list[Any]) -> None:
    """Twelve batch sizes, two segment lengths, layers with a memory and without, all stages."""
    model = small_model(compile=True, num_layers=3, layers=[1], xl_cache=5)
    plain = small_model(num_layers=3, layers=[1], xl_cache=5)
    counts: list[int] = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for segment in (5, 7):
            for rows in (2, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12):
                ids = random_tokens(rows, segment)
                for mode in MODES.values():
                    with mode():
                        bank = model.new_memory(rows)
                        bank.commit(model(ids, bank).pairs)
                        logits = model(ids, bank).logits
                with torch.inference_mode():
                    bank = plain.new_memory(rows)
                    bank.commit(plain(ids, bank).pairs)
                    assert torch.equal(logits, plain(ids, bank).logits)
                counts.append(len(graphs))
    methods = 1  # reading a segment
    assert counts[0] == methods * len(MODES)
    assert counts[3] == counts[11]
    assert counts[15] == counts[-1] <= 5 * counts[0]
