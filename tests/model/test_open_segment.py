"""A text read token by token gives the logits of one that is read segment by segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import COMBINES, VOCAB, small_model
from torch import Tensor

from memorizing_transformers.generation.session import Session
from memorizing_transformers.model import Transformer

N, LENGTH = 6, 45
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"combine": name} for name in COMBINES},
    **{f"{name}-xl": {"combine": name, "xl_cache": 5} for name in COMBINES},
    "short-cache": {"xl_cache": 2},
    "long-cache": {"xl_cache": 14},
    "t5": {"position_bias": "t5", "xl_cache": 4},
    "log": {"position_bias": "log"},
    "matches": {"match_length": 4, "candidates": 2, "combine": "evidence", "xl_cache": 5},
    "copies": {"copy": ["neighbours", "repeats"], "xl_cache": 5},
    "copy-two": {"copy": ["neighbours"], "copy_top_k": 2},
    "repeats": {"copy": ["repeats"], "size": 30},
    "int8": {"dtype": "int8", "size": 20},
    "bf16": {"dtype": "bfloat16", "size": 20},
    "two-layers": {"layers": [0, 1], "size": 20, "xl_cache": 5},
    "no-memory": {"layers": [], "xl_cache": 5},
    "nothing": {"layers": []},
    "base-options": {"value_residual": True, "embedding_shortcut": True, "activation": "relu2"},
    "temperature": {"temperature": True, "qk_norm": False},
}


def text(rows: int = 2, count: int = LENGTH) -> Tensor:
    """Tokens with repetitions."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (rows, count), generator=generator)
    ids[:, 2 * count // 3 :] = ids[:, : count - 2 * count // 3]
    return ids


@torch.no_grad()
def by_segment(model: Transformer, ids: Tensor) -> Tensor:
    """Logits, as validation computes them."""
    bank, logits = model.new_memory(len(ids)), []
    for part in ids.split(N, 1):
        output = model(part, bank)
        logits.append(output.logits)
        bank.commit(output.pairs, token_ids=part)
    return torch.cat(logits, 1)


def in_parts(session: Session, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a text that comes in parts of these sizes, over and over."""
    logits, start, turn = [], 0, 0
    while start < ids.shape[1]:
        part = ids[:, start : start + sizes[turn % len(sizes)]]
        logits += [output.logits for _, output in session.parts(part)]
        start, turn = start + part.shape[1], turn + 1
    return torch.cat(logits, 1)


@pytest.mark.parametrize("sizes", [[1], [4], [5, 1, 13]], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_in_whatever_parts_a_text_comes_its_logits_are_the_same(
    name: str, sizes: list[int]
) -> None:
    model, ids = small_model(**SETTINGS[name]).eval(), text()
    expected = by_segment(model, ids)
    found = in_parts(Session(model, 2, N), ids, sizes)
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


def test_whole_segments_are_read_bit_for_bit_as_training_reads_them() -> None:
    model, ids = small_model(xl_cache=5).eval(), text()
    assert torch.equal(in_parts(Session(model, 2, N), ids, [LENGTH]), by_segment(model, ids))


def test_nothing_is_written_before_a_segment_is_full() -> None:
    model, ids = small_model(size=50).eval(), text()
    session = Session(model, 2, N)
    written = []
    for token in ids.split(1, 1):
        session.read(token)
        written.append(int(session.bank.memories[1].written[0]))
    assert written == [(count + 1) // N * N for count in range(LENGTH)]
    assert torch.equal(session.bank.memories[1].token_ids[:, :42].long(), ids[:, :42])


def test_rows_do_not_read_each_other() -> None:
    model, ids = small_model(size=20, xl_cache=5).eval(), text()
    other = ids.clone()
    other[1] = other[1].flip(0)
    one, two = (in_parts(Session(model, 2, N), x, [1]) for x in (ids, other))
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1], two[1])


@pytest.mark.parametrize("read", [0, 10, 4 * N], ids=str)
@pytest.mark.parametrize("name", ["joint-xl", "copies", "t5", "matches", "int8", "two-layers"])
def test_taken_rows_and_those_they_come_from_go_on_as_if_alone(name: str, read: int) -> None:
    model, ids = small_model(**SETTINGS[name]).eval(), text()
    whole = by_segment(model, ids)
    session = Session(model, 2, N)
    for part in ids[:, :read].split(5, 1) if read else ():
        session.read(part)
    rows = [1, 0, 1]
    taken = session.take(rows)
    other = ids.flip(0)[[0, 0, 1]]  # what the third row reads on is another text
    mixed = torch.cat([ids[rows][:2], other[2:]])
    # One token of each in turn, past the end of a segment.
    for place in range(read, LENGTH):
        two = session.read(ids[:, place : place + 1])
        one = taken.read(mixed[:, place : place + 1])
        assert torch.allclose(one[:2], whole[rows[:2], place], atol=2e-4, rtol=1e-4)
        assert torch.allclose(two, whole[:, place], atol=2e-4, rtol=1e-4)
    alone = Session(model, 1, N)
    alone.read(torch.cat([ids[1:, :read], mixed[2:, read:]], 1)[:, :-1])
    last = alone.read(mixed[2:, -1:])
    assert torch.allclose(one[2:], last, atol=2e-4, rtol=1e-4)
