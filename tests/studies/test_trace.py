"""A trace holds what the model did: its losses, and its own neighbours, weights and distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import SEGMENT, bytes_of, identity_model, planted, report_on, small_model
from hostile import HOSTILE

from memorizing_studies.inspection.trace import NOT_FOUND, distance_edges, read_document
from memorizing_transformers import MemorizingTransformer

TEXT = HOSTILE * 2
IDS = bytes_of(TEXT)


def losses(model: MemorizingTransformer, size: int, segment: int) -> torch.Tensor:
    """Each token's loss, read by hand."""
    model.config.memory.size = size
    bank = model.new_memory(1)
    model.config.memory.size = 32
    tokens = torch.from_numpy(IDS)
    found = [torch.zeros(1)]
    for start in range(0, len(tokens) - 1, segment):
        inputs = tokens[start : start + segment][: len(tokens) - 1 - start]
        with torch.no_grad():
            output = model(inputs[None], bank)
        bank.commit(output.pairs)
        logs = output.logits[0].log_softmax(-1)
        found.append(-logs[torch.arange(len(inputs)), tokens[start + 1 : start + 1 + len(inputs)]])
    return torch.cat(found)


@pytest.mark.parametrize("xl_cache", [0, 8])
@pytest.mark.parametrize("size", [0, 32, 100])
def test_losses_are_those_of_reading_by_hand(size: int, xl_cache: int) -> None:
    model = small_model(xl_cache=xl_cache)
    trace = read_document(model, IDS, SEGMENT, size, 3)
    assert torch.allclose(torch.from_numpy(trace.nats), losses(model, size, SEGMENT), atol=1e-5)
    assert trace.nats[0] == 0
    assert np.isclose(trace.mean_nats, losses(model, size, SEGMENT)[1:].mean())


def test_switching_the_memory_off_leaves_the_xl_cache() -> None:
    off = read_document(small_model(xl_cache=8), IDS, SEGMENT, 0, 3)
    without = read_document(small_model(xl_cache=0), IDS, SEGMENT, 0, 3)
    assert off.layers == ()
    assert off.positions.size == 0
    assert not np.allclose(off.nats, without.nats)


def test_reading_changes_neither_weights_nor_settings() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_document(model, IDS, SEGMENT, 64, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.memory.size == 32


def test_the_tokens_read_are_counted() -> None:
    counts: list[int] = []
    read_document(small_model(), IDS, SEGMENT, 32, 3, counts.append)
    assert sum(counts) == len(IDS) - 1


@pytest.mark.parametrize("combine", ["gate", "content", "joint"])
def test_retrievals_are_the_best_pairs_of_a_memory_kept_by_hand(combine: str) -> None:
    """Two memory layers, grouped heads, a ring that wraps around in mid-segment."""
    model = small_model(layers=[0, 1], combine=combine, size=40)
    trace = read_document(model, IDS, SEGMENT, 40, 3)
    bank = model.new_memory(1)
    kept: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    tokens = torch.from_numpy(IDS)
    for start in range(0, len(IDS) - 1, SEGMENT):
        inputs = tokens[start : start + SEGMENT][: len(IDS) - 1 - start]
        with torch.no_grad():
            output = model(inputs[None], bank)
        for number, layer in enumerate((0, 1)):
            retrieval = output.retrievals[layer]
            keys = torch.cat(kept[layer], dim=1) if kept[layer] else None
            for n in range(len(inputs)):
                entry = trace.positions[number, :, :, start + n + 1]
                if keys is None:
                    assert (entry == NOT_FOUND).all()
                    assert (trace.weights[number, :, :, start + n + 1] == 0).all()
                    continue
                queries = retrieval.queries[0, :, n]
                scores = torch.einsum("hd,hmd->hm", queries, keys.repeat_interleave(2, 0))
                scores[:, : max(0, start - 40)] = -torch.inf
                best = scores.topk(4)
                # The same token gives the same key in layer 0: positions may differ, scores not.
                chosen = scores.gather(1, torch.from_numpy(entry).long())
                assert torch.allclose(chosen, best.values[:, :3], atol=1e-4)
                assert all(len(set(places)) == 3 for places in entry.tolist())
                weights = best.values.softmax(-1)[:, :3].numpy()
                assert np.allclose(trace.weights[number, :, :, start + n + 1], weights, atol=1e-5)
                distances = trace.distances()[number, :, :, start + n + 1]
                assert (distances == start + n - entry).all()
            shares = retrieval.share[0].numpy()
            where = slice(start + 1, start + 1 + len(inputs))
            assert np.allclose(trace.shares[number, :, where], shares)
            kept[layer].append(output.pairs.memory[layer][0][0])
        bank.commit(output.pairs)


def test_use_adds_up_over_all_neighbours() -> None:
    trace = read_document(small_model(), IDS, SEGMENT, 32, 4)
    use, found = trace.use, trace.positions[:, :, 0] != NOT_FOUND
    positions, weights = trace.positions, trace.weights
    assert use.queries.tolist() == found[:, 0].sum(-1).tolist()
    assert np.allclose(use.by_distance.sum(-1), use.queries[:, None])
    assert np.allclose(use.share, (trace.shares * found).sum(-1), rtol=1e-4)
    target = IDS[positions] == IDS
    after = IDS[np.minimum(positions + 1, len(IDS) - 1)] == IDS
    assert np.allclose(use.on_target, (weights * target).sum((2, 3)), rtol=1e-4)
    assert np.allclose(use.before_target, (weights * after).sum((2, 3)), rtol=1e-4)
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(2)
    assert np.allclose(use.spread, (np.exp(entropy) * found).sum(-1), rtol=1e-4)
    expected, _ = np.histogram(trace.distances()[0, 1], use.edges, weights=weights[0, 1])
    assert np.allclose(use.by_distance[0, 1], expected, rtol=1e-4)


def test_distances_have_a_bin() -> None:
    for length in (2, 3, 100, 4097):
        edges = distance_edges(length)
        assert edges[0] == 1
        assert edges[-1] >= length - 1
        assert (np.diff(edges) > 0).all()


PLANTS = {
    "alpha": (700, 11_000),
    "beta": (5_119, 15_359),
    "gamma": (12_287, 24_000),
    "delta": (13_800, 25_900),
}
"""Defined once and used more than 10,000 tokens later; the last two after the ring, of 12,288, has
wrapped around. Two stand across the edge of a segment of 512."""


def test_planted_names_are_found_where_they_were_defined() -> None:
    text, words = planted(26_000, PLANTS)
    model = identity_model(words)
    report = report_on(text, model, (4096, 12_288), segment=512, retrieved=2)
    small, large = report.readings
    pieces = [piece.strip() for piece in report.pieces]
    for name, (defined, used) in PLANTS.items():
        predicted = used + 1  # the value, predicted while the model read the name
        assert (pieces[used], pieces[predicted]) == (name, name.upper())
        assert large.positions[0, :, 0, predicted].tolist() == [defined, defined]
        assert (pieces[defined], pieces[defined + 1]) == (name, pieces[predicted])
        assert large.distances()[0, :, 0, predicted].tolist() == [used - defined] * 2
        # A memory that no longer holds the definition cannot find it.
        assert defined not in small.positions[0, :, :, predicted]


def test_every_retrieved_token_is_the_queries_own_where_the_memory_holds_it() -> None:
    text, words = planted(3_000, {"alpha": (30, 2_900)})
    report = report_on(text, identity_model(words), (700,), segment=128)
    (trace,) = report.readings
    ids = report.tokens.ids
    for predicted in range(1, len(ids)):
        query = predicted - 1
        first = query - query % 128  # the memory holds what was read before this segment
        held = np.arange(max(0, first - 700), first)
        places = trace.positions[0, :, :, predicted]
        assert np.isin(places[places != NOT_FOUND], held).all()
        same = (ids[held] == ids[query]).sum()
        expected = min(3, same)
        assert (ids[places[:, :expected]] == ids[query]).all()
