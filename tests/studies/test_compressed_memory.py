"""Memories that were compressed: the formulas, no leak, and no copies of single pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import make_data, make_module, make_trainer, write_texts
from token_losses import losses, with_another_end

from memorizing_studies.rivals.compressed_memory import CompressedMemory, read_matrix, read_means
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.model.gates import GATES

KINDS = pytest.mark.parametrize("kind", ["mean", "linear"])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("compressed") / "texts")


def stored(used: int, slots: int = 7) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and which slots are used, of two rows: one full, one of ``used``."""
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 1, n, 4, generator=draw) for n in (3, slots, slots))
    valid = torch.arange(slots) < torch.tensor([[slots], [used]])
    there = valid[:, None, :, None]
    return queries, keys * there, values * there, valid


@pytest.mark.parametrize("used", [1, 3, 4, 7])
@pytest.mark.parametrize("pool", [1, 2, 3, 10])
def test_means_of_consecutive_pairs_are_attended_to(pool: int, used: int) -> None:
    queries, keys, values, valid = stored(used)
    output, log_mass = read_means(queries, keys, values, valid, pool)
    for row, count in enumerate((7, used)):
        ends = range(0, count, pool)
        pooled = [
            torch.stack([x[row, 0, a : min(a + pool, count)].mean(0) for a in ends])
            for x in (keys, values)
        ]
        scores = queries[row, 0] @ pooled[0].T
        torch.testing.assert_close(output[row, 0], scores.softmax(-1) @ pooled[1])
        torch.testing.assert_close(log_mass[row, 0], scores.logsumexp(-1))


@pytest.mark.parametrize("used", [1, 7])
def test_a_matrix_is_linear_attention_to_all_pairs(used: int) -> None:
    queries, keys, values, valid = stored(used)
    output, log_mass = read_matrix(queries, keys, values, valid)
    for row, count in enumerate((7, used)):
        weights = (F.elu(queries[row, 0]) + 1) @ (F.elu(keys[row, 0, :count]) + 1).T
        mass = weights.sum(-1)
        torch.testing.assert_close(log_mass[row, 0], mass.log())
        torch.testing.assert_close(output[row, 0], weights @ values[row, 0, :count] / mass[:, None])


@KINDS
def test_a_document_reads_itself_alone(texts: Path, kind: Any) -> None:
    plain, alone, together = (
        losses(texts, *more, rows=rows)
        for more, rows in (
            ([], 1),
            ([CompressedMemory(kind)], 1),
            ([CompressedMemory(kind)], 3),
        )
    )
    for document, values in alone.items():
        assert values[:16] == pytest.approx(plain[document][:16], abs=1e-6)
        assert values[16:] != pytest.approx(plain[document][16:], abs=1e-6)
        assert values == pytest.approx(together[document], abs=1e-5)


@KINDS
def test_the_end_of_a_text_changes_no_loss_before_it(
    texts: Path, tmp_path: Path, kind: Any
) -> None:
    other = with_another_end(texts, tmp_path / "texts")
    one, changed = (losses(folder, CompressedMemory(kind)) for folder in (texts, other))
    for document, values in one.items():
        assert values[:-41] == changed[document][:-41]
        assert values[-30:] != changed[document][-30:]


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_trains(texts: Path, kind: Any, dtype: str) -> None:
    module = make_module(dtype=dtype)
    trainer = make_trainer(callbacks=[CompressedMemory(kind)], max_steps=6)
    trainer.fit(module, datamodule=make_data(texts))
    gates = [reader.gate.learned() for reader in module.net.readers().values()]
    plain = make_module(dtype=dtype)
    make_trainer(max_steps=6).fit(plain, datamodule=make_data(texts))
    others = [reader.gate.learned() for reader in plain.net.readers().values()]
    assert all(torch.isfinite(x).all() for x in gates)
    assert not all(torch.equal(a, b) for a, b in zip(gates, others, strict=True))


def test_the_model_reads_as_before_afterwards(texts: Path) -> None:
    module, data = make_module(), make_data(texts)
    found = []
    for callbacks in ([], [CompressedMemory()], []):
        trainer = make_trainer(callbacks=callbacks)
        found.append(trainer.test(module, datamodule=data, verbose=False)[0]["test/loss"])
    assert found[0] == found[2] != found[1]


NEED_PAIRS: list[dict[str, Any]] = [
    {"copy": ["neighbours"]},
    *({"position_bias": kind} for kind in ("t5", "learned-absolute", "log")),
    {"match_length": 4},
    {"combine": "evidence"},
]


@pytest.mark.parametrize("settings", NEED_PAIRS, ids=str)
def test_what_needs_single_pairs_is_refused(texts: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(callbacks=[CompressedMemory()])
    ((key, value),) = settings.items()
    with pytest.raises(ConfigError, match="to compress the memory") as caught:
        trainer.test(make_module(**settings), datamodule=make_data(texts))
    assert str(caught.value).startswith(f"model.memory.{key} = {value!r}: ")


@KINDS
@pytest.mark.parametrize("combine", [name for name in GATES if name != "evidence"])
def test_every_other_gate_reads_finite_numbers(texts: Path, kind: Any, combine: Any) -> None:
    found = losses(texts, CompressedMemory(kind), combine=combine, temperature=True)
    assert all(np.isfinite(values).all() for values in found.values())


def test_compiled_code_and_an_empty_pool_are_refused(texts: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        CompressedMemory(pool=0)
    trainer = make_trainer(callbacks=[CompressedMemory()])
    module = make_module()
    module.config.compile = True
    with pytest.raises(ConfigError, match=r"model\.compile"):
        trainer.test(module, datamodule=make_data(texts))
