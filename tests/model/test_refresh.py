"""Refreshed pairs against reading the document anew, and what is dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from build import random_tokens, read, small_model
from torch import Tensor

from memorizing_transformers.memory import Memory, MemoryBank, drop_drifted, refresh
from memorizing_transformers.memory.refresh import oldest_drift
from memorizing_transformers.model import Transformer

SEGMENT, NOW = 5, 77
VARIANTS = {
    "plain": {},
    "XL cache": {"xl_cache": 5},
    "XL cache of another length": {"xl_cache": 8},
    "several memory layers": {"num_layers": 3, "layers": [0, 1, 2]},
    "several with XL cache": {"num_layers": 3, "layers": [0, 2], "xl_cache": 5, "combine": "joint"},
    "bias": {"num_layers": 3, "layers": [0, 1], "position_bias": "t5"},
    "base options": {"value_residual": True, "embedding_shortcut": True, "activation": "relu2"},
    "not the last layer": {"num_layers": 3, "layers": [1], "qk_norm": False, "xl_cache": 3},
}


def changed(model: Transformer) -> Transformer:
    """The same model some training steps later."""
    later = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return later


@torch.no_grad()
def filled(model: Transformer, tokens: Tensor, resets: dict[int, list[bool]] | None = None):
    bank = model.new_memory(tokens.shape[0])
    read(model, bank, tokens, SEGMENT, resets)
    return bank


def numbered(memory: Memory, row: int) -> dict[int, tuple[Tensor, Tensor, int]]:
    """Keys, values and steps of a row's retrievable pairs, by their position."""
    slots = memory.valid()[row].nonzero().flatten().tolist()
    return {
        int(memory.positions[row, slot]): (
            memory.keys[row, :, slot],
            memory.values[row, :, slot],
            int(memory.steps[row, slot]),
        )
        for slot in slots
    }


def assert_close_pairs(one: Memory, other: Memory, row: int, first: int = 0) -> None:
    """The same pairs from position ``first`` on."""
    ours, theirs = (numbered(memory, row) for memory in (one, other))
    assert ours.keys() == theirs.keys()
    for position, (key, value, _) in ours.items():
        if position >= first:
            torch.testing.assert_close(key, theirs[position][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(value, theirs[position][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["same", "changed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_document_that_is_whole_is_as_if_read_anew(name: str, weights: str) -> None:
    """Rows of different lengths, one empty, one with a padded end."""
    model = small_model(size=40, **VARIANTS[name]).eval()
    later = changed(model) if weights == "changed" else model
    tokens = random_tokens(4, 40)
    lengths = torch.tensor([40, 25, 0, 17])
    banks = [model.new_memory(4), later.new_memory(4)]
    with torch.no_grad():
        for net, bank in zip((model, later), banks, strict=True):
            for step, ids in enumerate(tokens.split(SEGMENT, 1)):
                mask = torch.arange(SEGMENT) + step * SEGMENT < lengths[:, None]
                bank.commit(net(ids, bank).pairs, mask, ids, step)
    stale, fresh = banks
    before = {name: tensor.clone() for name, tensor in stale.tensors().items()}
    refresh(later.encode, stale, SEGMENT, NOW)
    for layer, memory in stale.memories.items():
        for row in range(4):
            assert_close_pairs(memory, fresh.memories[layer], row)
            assert all(step == NOW for _, _, step in numbered(memory, row).values())
        assert memory.fill.tolist() == lengths.tolist()
    for name, tensor in stale.tensors().items():
        if not name.endswith(("keys", "values", "steps")) or name.startswith("cache"):
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("size", [15, 18, 21])
@pytest.mark.parametrize("xl_cache", [0, 5, 8])
def test_where_the_beginning_is_gone_whole_segments_are_exact_and_the_rest_left(
    size: int, xl_cache: int
) -> None:
    """The first memory layer above one other: a cache filled from nothing is exact."""
    model = small_model(size=size, xl_cache=xl_cache).eval()
    later = changed(model)
    tokens = random_tokens(2, 45)
    stale, fresh = filled(model, tokens), filled(later, tokens)
    old = copy.deepcopy(stale)
    refresh(later.encode, stale, SEGMENT, NOW)
    memory = stale.memories[1]
    first = -(-(45 - size) // SEGMENT) * SEGMENT + -(-xl_cache // SEGMENT) * SEGMENT
    for row in range(2):
        assert_close_pairs(memory, fresh.memories[1], row, first)
        steps = {position: step for position, (_, _, step) in numbered(memory, row).items()}
        assert len(steps) == size
        assert {p for p, step in steps.items() if step == NOW} == set(range(first, 45))
        kept = numbered(old.memories[1], row)
        for position in set(range(45 - size, 45)) - set(range(first, 45)):
            assert torch.equal(numbered(memory, row)[position][0], kept[position][0])
    # What follows is read and written as if the stale pairs had never been there.
    stale.caches = copy.deepcopy(fresh.caches)
    more = random_tokens(2, 10, seed=4)
    with torch.no_grad():
        for bank in (stale, fresh):
            read(later, bank, more, SEGMENT)
    for row in range(2):
        assert_close_pairs(memory, fresh.memories[1], row, first)


def test_rows_are_refreshed_each_by_itself() -> None:
    settings = {"size": 22, "num_layers": 3, "layers": [0, 1], "xl_cache": 5}
    model = small_model(**settings).eval()
    later = changed(model)
    resets = {2: [False, True, False], 7: [False, False, True]}
    tokens = random_tokens(3, 45)
    together = filled(model, tokens, resets)
    refresh(later.encode, together, SEGMENT, NOW)
    for row in range(3):
        alone = model.new_memory(1)
        own = {step: [flags[row]] for step, flags in resets.items()}
        with torch.no_grad():
            read(model, alone, tokens[row : row + 1], SEGMENT, own)
        refresh(later.encode, alone, SEGMENT, NOW)
        for layer, memory in together.memories.items():
            ours, theirs = numbered(memory, row), numbered(alone.memories[layer], 0)
            assert ours.keys() == theirs.keys()
            for position, (key, value, step) in ours.items():
                torch.testing.assert_close(key, theirs[position][0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(value, theirs[position][1], rtol=1e-4, atol=1e-5)
                assert step == theirs[position][2]


def test_what_an_earlier_document_left_behind_is_not_read() -> None:
    """Bit for bit: tokens, keys and values of slots that nobody may retrieve."""
    model = small_model(size=30, num_layers=3, layers=[0, 1], xl_cache=5).eval()
    tokens = random_tokens(2, 40)
    banks = [filled(model, tokens, {5: [True, False]}) for _ in range(2)]
    for memory in banks[1].memories.values():
        unused = ~memory.valid()
        assert unused[0].any()
        memory.token_ids[unused] = 1
        for store in (memory.keys, memory.values):
            store.masked_fill_(unused[:, None, :, None], torch.nan)
    for bank in banks:
        refresh(changed(model).encode, bank, SEGMENT, NOW)
    for layer, memory in banks[0].memories.items():
        valid, other = memory.valid(), banks[1].memories[layer]
        for one, two in ((memory.keys, other.keys), (memory.values, other.values)):
            assert torch.equal(one.transpose(1, 2)[valid], two.transpose(1, 2)[valid])


def test_a_memory_taken_over_from_a_smaller_one_is_refreshed_too() -> None:
    model, later = small_model(size=15).eval(), changed(small_model(size=40)).eval()
    tokens = random_tokens(2, 45)
    bank = later.new_memory(2)
    bank.load(filled(model, tokens).tensors())
    fresh = filled(later, tokens)
    refresh(later.encode, bank, SEGMENT, NOW)
    ours, expected = (numbered(b.memories[1], 0) for b in (bank, fresh))
    assert set(ours) == set(range(30, 45))
    for position, (key, _, step) in ours.items():
        torch.testing.assert_close(key, expected[position][0], rtol=1e-4, atol=1e-5)
        assert step == NOW


def test_dropped_pairs_stay_dropped_and_still_fill_the_cache() -> None:
    model = small_model(size=40, xl_cache=5).eval()
    later = changed(model)
    tokens = random_tokens(2, 40)
    stale, fresh = filled(model, tokens), filled(later, tokens)
    for bank in (stale, fresh):
        bank.memories[1].drop(torch.tensor([10, 13]))
    refresh(later.encode, stale, SEGMENT, NOW)
    assert stale.memories[1].fill.tolist() == [30, 27]
    assert_close_pairs(stale.memories[1], fresh.memories[1], 0, first=10)
    assert_close_pairs(stale.memories[1], fresh.memories[1], 1, first=15)


def test_interrupted_it_leaves_a_memory_that_is_whole() -> None:
    model = small_model(size=30).eval()
    bank = filled(model, random_tokens(2, 40))
    before = copy.deepcopy(bank.memories[1])
    calls = []

    def encode(ids: Tensor, read_from: MemoryBank) -> list[tuple[Tensor, Tensor]]:
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model.encode(ids, read_from)

    with pytest.raises(KeyboardInterrupt):
        refresh(encode, bank, SEGMENT, NOW)
    after = bank.memories[1]
    assert after.max_fill == before.max_fill
    for row in range(2):
        assert_close_pairs(after, before, row)
        steps = [step for _, (_, _, step) in sorted(numbered(after, row).items())]
        assert steps == [NOW] * 10 + [4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7]


def test_encoding_gives_the_pairs_of_a_forward_pass() -> None:
    model = small_model(size=30, num_layers=3, layers=[0, 1], xl_cache=5).eval()
    bank = filled(model, random_tokens(2, 20))
    ids = random_tokens(2, SEGMENT, seed=9)
    pairs = model(ids, bank).pairs
    encoded = model.encode(ids, bank)
    assert (encoded.memory.keys(), encoded.cache.keys()) == ({0, 1}, {0, 1})
    for kind in ("memory", "cache"):
        ours, theirs = getattr(encoded, kind), getattr(pairs, kind)
        for layer in (0, 1):
            assert all(map(torch.equal, ours[layer], theirs[layer]))


@pytest.mark.parametrize("settings", [{}, {"xl_cache": 5}, {"num_layers": 3, "layers": [1, 2]}])
@pytest.mark.parametrize("size", [18, 40])
def test_drift_is_that_of_the_oldest_whole_segment(size: int, settings: dict) -> None:
    model = small_model(size=size, **settings).eval()
    bank = filled(model, random_tokens(2, 45), {7: [True, False]})
    cosine, count = oldest_drift(model.encode, bank, SEGMENT)
    torch.testing.assert_close(cosine, torch.ones(2))
    lead = SEGMENT if settings.get("xl_cache") else 0
    first = -(-(45 - size) // SEGMENT) * SEGMENT + lead
    assert count.tolist() == [SEGMENT, first + SEGMENT - (45 - size)]
    memory = bank.memories[1]
    turned = (memory.positions[1] >= first) & (memory.positions[1] < first + SEGMENT)
    memory.keys[1, :, turned] *= -1
    cosine, _ = oldest_drift(model.encode, bank, SEGMENT)
    torch.testing.assert_close(cosine, torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("xl_cache", [0, 5])
@pytest.mark.parametrize("held", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT - 1])
def test_a_segment_that_was_only_begun_is_not_judged(held: int, xl_cache: int) -> None:
    """Whatever its keys are: one that is whole is, be there a begun one behind it or not."""
    model = small_model(size=40, xl_cache=xl_cache).eval()
    bank = model.new_memory(2)
    with torch.no_grad():
        for number, ids in enumerate(random_tokens(2, 10).split(SEGMENT, 1)):
            real = torch.tensor([held, 2 * SEGMENT])[:, None]
            mask = torch.arange(SEGMENT) + number * SEGMENT < real
            bank.commit(model(ids, bank).pairs, mask, ids)
    memory = bank.memories[1]
    memory.keys[0, :, SEGMENT * (held // SEGMENT) :] *= -1
    for turned in (1.0, -1.0):
        memory.keys[0, :, :SEGMENT] *= turned if held >= SEGMENT else 1.0
        cosine, count = oldest_drift(model.encode, bank, SEGMENT)
        judged = held >= SEGMENT
        torch.testing.assert_close(cosine, torch.tensor([turned if judged else 1.0, 1.0]))
        assert count.tolist() == [SEGMENT if judged else 0, SEGMENT]
    drop_drifted(model.encode, bank, SEGMENT, 0.9)
    assert memory.fill.tolist() == [held % SEGMENT if held >= SEGMENT else held, 2 * SEGMENT]


def test_drifted_segments_are_dropped_up_to_the_first_that_holds() -> None:
    model = small_model(size=40, num_layers=3, layers=[1, 2]).eval()
    bank = filled(model, random_tokens(3, 40), {6: [False, False, True]})
    memory = bank.memories[1]
    # Row 0: segments 0 to 2 have drifted, and 5, which nobody looks at. Row 1: none but 1.
    for row, segments in ((0, (0, 1, 2, 5)), (1, (1,))):
        for number in segments:
            memory.keys[row, :, number * SEGMENT : (number + 1) * SEGMENT] *= -1
    drop_drifted(model.encode, bank, SEGMENT, 0.9)
    for layer in (1, 2):
        assert bank.memories[layer].fill.tolist() == [25, 40, 10]
        assert min(numbered(bank.memories[layer], 0)) == 15


def test_everything_may_be_dropped() -> None:
    model = small_model(size=18).eval()
    bank = filled(model, random_tokens(2, 45))
    bank.memories[1].keys *= -1
    drop_drifted(model.encode, bank, SEGMENT, 0.9)
    assert bank.memories[1].fill.tolist() == [0, 0]


def test_a_memory_without_a_whole_segment_is_left_alone() -> None:
    model = small_model(size=7, xl_cache=5).eval()
    bank = filled(model, random_tokens(2, 45))
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    refresh(changed(model).encode, bank, SEGMENT, NOW)
    drop_drifted(changed(model).encode, bank, SEGMENT, 0.999)
    for name, tensor in bank.tensors().items():
        if not name.endswith("oldest"):
            assert torch.equal(tensor, before[name]), name
    assert bank.memories[1].fill.tolist() == [7, 7]
    empty = MemoryBank(2)
    refresh(model.encode, empty, SEGMENT, NOW)
    drop_drifted(model.encode, empty, SEGMENT, 0.5)
