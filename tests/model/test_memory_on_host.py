"""A memory on the host beside a model elsewhere: same figures, nothing mixed, little moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from build import COMBINES, random_tokens, small_model
from torch import Tensor
from two_devices import AWAY, CPU, Crossing, TwoDevices, send_away, two_devices

from memorizing_transformers.memory import MemoryBank, drop_drifted, refresh
from memorizing_transformers.memory.refresh import oldest_drift
from memorizing_transformers.model import Transformer
from memorizing_transformers.model.attention import Attention, MemoryLayerAttention

ROWS, SEGMENT, SEGMENTS = 2, 5, 6
VARIANTS: dict[str, dict[str, Any]] = {
    **{combine: {"combine": combine} for combine in COMBINES},
    "t5 bias and XL cache": {"position_bias": "t5", "xl_cache": 4},
    "bias by age": {"position_bias": "learned-absolute", "combine": "joint"},
    "no QK normalisation": {"qk_norm": False},
    "two memory layers": {"num_layers": 3, "layers": [0, 2], "xl_cache": 5},
    "recomputed": {"activation_checkpointing": True, "xl_cache": 5},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8", "search": "bucketed"},
    "auto": {"search": "auto"},
    "faiss": {"search": "faiss-flat", "size": 16},
}


def make(device: str, dtype: str = "float32", **settings: Any) -> Transformer:
    model = small_model(**settings)
    model.config.memory.device, model.config.memory.dtype = device, dtype  # type: ignore[assignment]
    return model


def train(model: Transformer, tokens: Tensor) -> tuple[list[float], MemoryBank]:
    """Read in segments, commit, then go backward; a row is reset and one padded on the way."""
    bank = model.new_memory(ROWS)
    losses = []
    for number, ids in enumerate(tokens.split(SEGMENT, 1)):
        begins = torch.arange(ROWS) == number - 3
        bank.reset(begins.to(ids.device), begins)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 3 + number :] = False
        output = model(ids, bank)
        bank.commit(output.pairs, mask, ids, number)
        loss = model.loss(output.logits[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
    return losses, bank


def numbers(x: Tensor) -> Tensor:
    """What a tensor holds, wherever it is."""
    return getattr(x, "held", x)


@contextmanager
def beside(**settings: Any) -> Iterator[tuple[Transformer, TwoDevices]]:
    """A model away, its memory on the CPU."""
    model = make("cpu", **settings)
    with two_devices() as devices:
        send_away(model)
        yield model, devices


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_elsewhere_computes_the_same_and_mixes_nothing(name: str) -> None:
    if "faiss" in name:
        pytest.importorskip("faiss")
    tokens = random_tokens(ROWS, SEGMENT * SEGMENTS)
    plain = make("model", **VARIANTS[name])
    losses, bank = train(plain, tokens)
    with beside(**VARIANTS[name]) as (model, _):
        other_losses, other = train(model, tokens.to(AWAY))
        assert {memory.device for memory in other.memories.values()} == {CPU}
        assert all(cache.keys.device == AWAY for cache in other.caches.values())
        found = other.tensors()
    torch.testing.assert_close(other_losses, losses)
    for key, tensor in bank.tensors().items():
        torch.testing.assert_close(numbers(found[key]), tensor, msg=key)
    for key, weight in model.named_parameters():
        own = plain.get_parameter(key)
        assert (weight.grad is None) == (own.grad is None)
        if weight.grad is not None:
            assert own.grad is not None
            torch.testing.assert_close(numbers(weight.grad), own.grad, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_where_the_model_is_on_the_cpu_too_nothing_changes(name: str) -> None:
    if "faiss" in name:
        pytest.importorskip("faiss")
    tokens = random_tokens(ROWS, SEGMENT * SEGMENTS)
    models = [make(device, **VARIANTS[name]) for device in ("model", "cpu")]
    (losses, bank), (other_losses, other) = (train(model, tokens) for model in models)
    assert other_losses == losses
    assert all(torch.equal(x, other.tensors()[key]) for key, x in bank.tensors().items())
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert one.grad is two.grad is None or torch.equal(one.grad, two.grad)


def test_only_queries_and_the_outcome_travel() -> None:
    """More neighbours than dimensions, so that what must stay would be the larger."""
    heads, groups, width, buckets = 4, 2, 4, 32
    with beside(position_bias="t5", top_k=6, xl_cache=5) as (model, devices):
        tokens = random_tokens(ROWS, 2 * SEGMENT).to(AWAY)
        bank = model.new_memory(ROWS)
        bank.commit(model(tokens[:, :SEGMENT], bank).pairs, token_ids=tokens[:, :SEGMENT])
        devices.crossings.clear()
        output = model(tokens[:, SEGMENT:], bank)
        assert devices.crossings == [
            Crossing(AWAY, (ROWS, heads, SEGMENT, width)),  # queries
            Crossing(AWAY, (buckets, heads)),  # the table of biases
            Crossing(CPU, (ROWS, heads, SEGMENT, width)),  # the output
            Crossing(CPU, (ROWS, heads, SEGMENT)),  # log mass
            Crossing(CPU, (ROWS, heads, SEGMENT)),  # where there was a memory
        ]
        devices.crossings.clear()
        bank.commit(output.pairs, token_ids=tokens[:, SEGMENT:])
        pair = Crossing(AWAY, (ROWS, groups, SEGMENT, width))
        assert devices.crossings == [pair, pair, Crossing(AWAY, (ROWS, SEGMENT))]


def test_queries_travel_before_local_attention_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind it the copy would wait for it, and the host would search alone."""
    seen: list[list[Crossing]] = []
    local = Attention.local
    with beside() as (model, devices):

        def spy(self: Attention, *arguments: Any, **options: Any) -> Any:
            if isinstance(self, MemoryLayerAttention):
                seen.append(devices.crossings[:])
            return local(self, *arguments, **options)

        monkeypatch.setattr(Attention, "local", spy)
        tokens = random_tokens(ROWS, SEGMENT).to(AWAY)
        bank = model.new_memory(ROWS)
        devices.crossings.clear()
        model(tokens, bank)
    assert seen == [[Crossing(AWAY, (ROWS, 4, SEGMENT, 4))]]


@pytest.mark.parametrize("act", ["refresh", "drop_drifted", "oldest_drift"])
def test_stale_pairs_are_looked_after(act: str) -> None:
    settings = {"size": 40, "num_layers": 3, "layers": [0, 2], "xl_cache": 5}
    tokens, found = random_tokens(ROWS, SEGMENT * SEGMENTS), []
    for away in (False, True):
        with ExitStack() as stack, torch.no_grad():
            model = make("cpu", **settings)
            if away:
                stack.enter_context(two_devices())
                send_away(model)
                tokens = tokens.to(AWAY)
            bank = model.new_memory(ROWS)
            for ids in tokens.split(SEGMENT, 1):
                bank.commit(model(ids, bank).pairs, token_ids=ids)
            for weight in model.layers[0].parameters():
                weight.add_(
                    torch.linspace(-0.3, 0.3, weight.shape[0], device=weight.device).view(
                        -1, *[1] * (weight.ndim - 1)
                    )
                )
            if act == "refresh":
                refresh(model.encode, bank, SEGMENT, 7)
            elif act == "drop_drifted":
                drop_drifted(model.encode, bank, SEGMENT, 0.9999999)
            else:
                found.append(list(oldest_drift(model.encode, bank, SEGMENT)))
            if act != "oldest_drift":
                stores = [memory.tensors() for memory in bank.memories.values()]
                found.append([x for store in stores for x in store.values()])
    for one, other in zip(*found, strict=True):
        assert other.device == CPU
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("first", ["model", "cpu"])
def test_a_memory_goes_on_from_one_device_on_the_other(first: str) -> None:
    """Loading copies into the ring's own tensors, where they are."""
    tokens = random_tokens(ROWS, SEGMENT * SEGMENTS)
    second = "cpu" if first == "model" else "model"
    with beside(xl_cache=5) as (model, _), torch.no_grad():
        banks = {}
        for device in (first, second):
            model.config.memory.device = device  # type: ignore[assignment]
            banks[device] = model.new_memory(ROWS)
        for ids in tokens.to(AWAY).split(SEGMENT, 1):
            banks[first].commit(model(ids, banks[first]).pairs, token_ids=ids)
        saved = {key: x.to("cpu", copy=True) for key, x in banks[first].tensors().items()}
        banks[second].load(saved)
        assert banks["cpu"].memories[1].device == CPU
        assert banks["model"].memories[1].device == AWAY
        for key, tensor in banks[second].tensors().items():
            assert torch.equal(numbers(tensor), saved[key]), key
        ids = tokens[:, :SEGMENT].to(AWAY)
        logits = [model(ids, bank).logits for bank in banks.values()]
    torch.testing.assert_close(*map(numbers, logits))


def test_faiss_reads_keys_on_the_host_where_they_lie() -> None:
    indexes = pytest.importorskip("memorizing_transformers.memory.search.faiss_index")
    model = make("cpu", size=16)
    memory = model.new_memory(1).memories[1]
    keys = indexes.RingHead(memory, 0, 1).keys(4, 12)
    assert np.shares_memory(keys, memory.keys.numpy())


def test_the_second_device_refuses_a_mixture() -> None:
    """What the tests above rely on."""
    with two_devices():
        away, here = torch.ones(2, 3, device=AWAY), torch.ones(2, 3)
        for mix in (
            lambda: away + here,
            lambda: here[away[:, 0].long()],
            lambda: torch.where(here > 0, away, 0.0),
            lambda: here.masked_fill_(away > 0, 0.0),
        ):
            with pytest.raises(RuntimeError, match="mixes devices"):
                mix()
        assert float((away + here.to(AWAY)).sum()) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu_both_places_agree(name: str) -> None:
    if "faiss" in name:
        pytest.importorskip("faiss")
    tokens = random_tokens(ROWS, SEGMENT * SEGMENTS).cuda()
    # A rough scan and an exact one would choose differently among keys of nearly one score.
    options = {**VARIANTS[name], "search": "exact"} if name == "int8" else VARIANTS[name]
    models = [make(device, **options).cuda() for device in ("model", "cpu")]
    (losses, bank), (other_losses, other) = (train(model, tokens) for model in models)
    assert all(memory.device.type == "cuda" for memory in bank.memories.values())
    assert all(memory.device == CPU for memory in other.memories.values())
    torch.testing.assert_close(other_losses, losses, rtol=1e-3, atol=1e-4)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-2, atol=1e-3)
