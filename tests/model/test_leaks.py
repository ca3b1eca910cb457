"""What one token, row or document must never learn of another.

Every comparison is bit for bit: a leak of the last digit is a leak.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import COMBINES, VOCAB, logits_of, random_tokens, read, small_model
from torch import Tensor

from memorizing_transformers.memory import SEARCHES

VARIANTS: list[dict[str, Any]] = [
    *({"combine": combine, "xl_cache": cache} for combine in COMBINES for cache in (0, 6)),
    {"combine": "joint", "position_bias": "t5", "layers": [0, 1], "xl_cache": 3},
    {"combine": "gate", "position_bias": "learned-absolute", "layers": [0, 1]},
    {"combine": "gate", "qk_norm": False, "num_kv_heads": 4, "xl_cache": 6},
    {"combine": "gate", "copy": ["neighbours", "repeats"], "xl_cache": 4},
    {"combine": "evidence", "match_length": 4, "temperature": True, "position_bias": "log"},
    {
        "combine": "content",
        "candidates": 2,
        "match_length": 3,
        "copy": ["neighbours"],
        "layers": [0, 1],
    },
    {"combine": "gate", "value_residual": True, "embedding_shortcut": True, "xl_cache": 4},
    # A search may keep an index of its own beside the ring, and share it between layers.
    *({"combine": "joint", "search": name, "layers": [0, 1], "size": 12} for name in SEARCHES),
]
SEGMENT = 5

variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: ",".join(f"{key}={value}" for key, value in v.items())
)


def changed(tokens: Tensor, row: int | slice, place: slice) -> Tensor:
    """A copy in which every token of that place is another one, never at the same distance."""
    copy = tokens.clone()
    shift = 1 + torch.arange(tokens.shape[1]) % (VOCAB - 1)
    copy[row, place] = (tokens + shift)[row, place] % VOCAB
    return copy


@variants
def test_the_next_document_of_a_row_knows_nothing_of_the_last(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    tokens = random_tokens(2, 6 * SEGMENT)
    other = changed(tokens, slice(None), slice(0, 3 * SEGMENT))
    begins = {3: [True, True]}
    first, second = (
        logits_of(read(model, model.new_memory(2), ids, SEGMENT, begins)) for ids in (tokens, other)
    )
    assert not torch.equal(first[:, : 3 * SEGMENT], second[:, : 3 * SEGMENT])
    assert torch.equal(first[:, 3 * SEGMENT :], second[:, 3 * SEGMENT :])


@variants
def test_without_the_reset_it_would_know(variant: dict[str, Any]) -> None:
    """Else the test above would pass for a model that reads nothing at all."""
    model = small_model(**variant)
    tokens = random_tokens(2, 4 * SEGMENT)
    other = changed(tokens, slice(None), slice(0, 3 * SEGMENT))
    first, second = (
        logits_of(read(model, model.new_memory(2), ids, SEGMENT)) for ids in (tokens, other)
    )
    assert not torch.equal(first[:, 3 * SEGMENT :], second[:, 3 * SEGMENT :])


@variants
def test_rows_know_nothing_of_each_other(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    tokens = random_tokens(3, 5 * SEGMENT)
    other = changed(tokens, 1, slice(0, 5 * SEGMENT))
    begins = {2: [False, True, False], 3: [True, False, False]}
    first, second = (
        logits_of(read(model, model.new_memory(3), ids, SEGMENT, begins)) for ids in (tokens, other)
    )
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[[0, 2]], second[[0, 2]])


@variants
def test_a_reset_row_behaves_as_a_new_one(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    tokens = random_tokens(2, 7 * SEGMENT)
    used = read(model, model.new_memory(2), tokens, SEGMENT, {3: [True, True]})
    fresh = read(model, model.new_memory(2), tokens[:, 3 * SEGMENT :], SEGMENT)
    assert torch.equal(logits_of(used[3:]), logits_of(fresh))


@variants
def test_a_token_changes_nothing_before_it(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    bank = model.new_memory(2)
    tokens = random_tokens(2, 5 * SEGMENT)
    read(model, bank, tokens[:, : 4 * SEGMENT], SEGMENT)
    last = tokens[:, 4 * SEGMENT :]
    before = model(last, bank).logits
    for place in range(SEGMENT):
        after = model(changed(last, slice(None), slice(place, place + 1)), bank).logits
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@variants
def test_a_segment_retrieves_only_what_was_committed_before_it(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    bank = model.new_memory(2)
    for number, ids in enumerate(random_tokens(2, 5 * SEGMENT).split(SEGMENT, dim=1)):
        output = model(ids, bank)
        for layer, retrieval in output.retrievals.items():
            positions = (
                bank.memories[layer].positions[:, None, None].expand(*retrieval.slots.shape[:3], -1)
            )
            index = retrieval.slots.masked_fill(~retrieval.valid, 0)
            retrieved = positions.gather(-1, index)[retrieval.valid]
            assert (retrieved < number * SEGMENT).all()
            assert (retrieved >= number * SEGMENT - bank.memories[layer].size).all()
        assert bool(output.retrievals[1].valid.any()) == (number > 0)
        bank.commit(output.pairs, token_ids=ids)


@variants
def test_forward_changes_nothing_in_the_bank(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    bank = model.new_memory(2)
    read(model, bank, random_tokens(2, 3 * SEGMENT), SEGMENT)
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    ids = random_tokens(2, SEGMENT, seed=1)
    first = model(ids, bank)
    first.logits.sum().backward()
    assert torch.equal(model(ids, bank).logits, first.logits)
    assert bank.tensors().keys() == before.keys()
    for name, tensor in bank.tensors().items():
        assert torch.equal(tensor, before[name]), name


@variants
def test_padding_changes_nothing_and_is_not_committed(variant: dict[str, Any]) -> None:
    """What stands behind a row's last token shows neither there nor in any later segment."""
    model = small_model(**variant)
    tokens = random_tokens(2, 4 * SEGMENT)
    padded = changed(tokens, 0, slice(2 * SEGMENT - 2, 2 * SEGMENT))
    mask = torch.ones(2, SEGMENT, dtype=torch.bool)
    mask[0, -2:] = False
    results, banks = [], []
    for ids in (tokens, padded):
        bank = model.new_memory(2)
        logits = []
        for number, segment in enumerate(ids.split(SEGMENT, dim=1)):
            output = model(segment, bank)
            bank.commit(output.pairs, mask if number == 1 else None, segment)
            logits.append(output.logits)
        results.append(torch.stack(logits))
        banks.append(bank)
    for number in range(4):
        real = mask if number == 1 else torch.ones_like(mask)
        assert torch.equal(results[0][number][real], results[1][number][real])
    assert banks[0].memories[1].written.tolist() == [4 * SEGMENT - 2, 4 * SEGMENT]
    for name, tensor in banks[0].tensors().items():
        assert torch.equal(tensor, banks[1].tensors()[name]), name


@variants
def test_an_empty_memory_is_no_memory(variant: dict[str, Any]) -> None:
    """Though its slots be full of NaN; and gate and bias get no gradient from it."""
    model = small_model(**variant)
    ids = random_tokens(2, SEGMENT)
    bank = model.new_memory(2)
    for memory in bank.memories.values():
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)
    plain, empty = model(ids).logits, model(ids, bank).logits
    if variant["combine"] == "joint" or variant.get("xl_cache"):
        # Local attention then sums in another order: by hand, or over the cache's masked places.
        torch.testing.assert_close(empty, plain)
    else:
        assert torch.equal(empty, plain)
    gradients = [
        torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
        for logits in (plain, empty)
    ]
    for without, with_empty in zip(*gradients, strict=True):
        if without is None:
            assert with_empty is None or not with_empty.any()
        else:
            torch.testing.assert_close(with_empty, without, atol=1e-4, rtol=1e-3)


@variants
def test_a_row_with_an_empty_memory_beside_a_full_one_is_plain(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    bank = model.new_memory(2)
    read(model, bank, random_tokens(2, 3 * SEGMENT), SEGMENT)
    bank.reset(torch.tensor([False, True]))
    ids = random_tokens(2, SEGMENT, seed=1)
    logits = model(ids, bank).logits
    plain = model(ids).logits
    torch.testing.assert_close(logits[1], plain[1])
    assert not torch.allclose(logits[0], plain[0])
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("combine", COMBINES)
def test_rubbish_in_unused_slots_changes_nothing(combine: str) -> None:
    """One row with fewer pairs than neighbours wanted, one with enough."""
    model = small_model(combine=combine, position_bias="t5", layers=[0, 1], size=16, top_k=6)
    ids = random_tokens(2, SEGMENT, seed=1)
    results = []
    for rubbish in (0.0, torch.nan, torch.inf):
        bank = model.new_memory(2)
        for memory in bank.memories.values():
            memory.keys.fill_(rubbish)
            memory.values.fill_(rubbish)
        first = random_tokens(2, 8)
        mask = torch.arange(8) < torch.tensor([[3], [8]])
        bank.commit(model(first, bank).pairs, mask)
        logits = model(ids, bank).logits
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
