"""The figures of a split against a plain loop over its documents, for any number of rows."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small import SEGMENT, by_hand, make_data, make_module, make_trainer

from memorizing_transformers.training.module import MemorizingLM

LONGEST = 1024
"""More than any document has tokens: nothing is ever evicted."""


@cache
def trained(texts: Path, **settings: Any) -> MemorizingLM:
    module = make_module(**settings)
    make_trainer(max_steps=15).fit(module, datamodule=make_data(texts))
    return module


def figures(module: MemorizingLM, texts: Path, split: str, **options: Any) -> dict[str, float]:
    trainer, data = make_trainer(limit_val_batches=1.0), make_data(texts, **options)
    run = trainer.validate if split == "validation" else trainer.test
    (found,) = run(module, datamodule=data, verbose=False)
    return {name.split("/")[1]: value for name, value in found.items()}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    "settings",
    [{"size": LONGEST}, {"size": 24}, {"size": 24, "xl_cache": SEGMENT}, {"combine": "joint"}],
    ids=str,
)
def test_figures_are_the_loops_for_any_number_of_rows(
    texts: Path, settings: dict[str, Any], rows: int, split: str
) -> None:
    module = trained(texts, **settings)
    store = getattr(make_data(texts), f"{split}_store")
    expected = by_hand(module.net, store)
    assert figures(module, texts, split, eval_rows=rows) == pytest.approx(expected, rel=1e-5)


def test_the_memory_takes_part(texts: Path) -> None:
    module = trained(texts, size=LONGEST)
    with_memory = figures(module, texts, "test")
    module.config.memory.size = 0
    try:
        without = figures(module, texts, "test")
    finally:
        module.config.memory.size = LONGEST
    assert without["loss"] != pytest.approx(with_memory["loss"], rel=1e-4)


def test_bytes_per_token_tell_tokenizers_apart(texts: Path) -> None:
    # Of single bytes, bits a byte are bits a token; a BPE's tokens are longer.
    found = figures(trained(texts, size=24), texts, "test")
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-6)
    bpe = {"tokenizer": "bpe", "bpe_vocab_size": 300}
    module = make_module()
    make_trainer(max_steps=2).fit(module, datamodule=make_data(texts, **bpe))
    found = figures(module, texts, "test", **bpe)
    expected = by_hand(module.net, make_data(texts, **bpe).test_store)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_byte"] < 0.8 * found["loss"] / math.log(2)
