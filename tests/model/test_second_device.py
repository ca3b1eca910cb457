"""A model and its memory on a pretended device: nothing mixed, the same figures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from build import random_tokens, small_config
from test_memory_on_host import ROWS, SEGMENT, SEGMENTS, VARIANTS, make, numbers, train
from torch import nn
from two_devices import AWAY, CPU, Away, send_away, two_devices

from memorizing_transformers.memory import SEARCHES, drop_drifted, refresh
from memorizing_transformers.memory.refresh import oldest_drift
from memorizing_transformers.memory.search import policy
from memorizing_transformers.model import Transformer

STARTS: dict[str, dict[str, Any]] = {
    "gate": {"combine": "gate", "relative_init": 2.0},
    "content": {"combine": "content", "position_bias": "t5"},
}


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STARTS)
def test_weights_begin_alike_on_every_device(name: str, default: torch.dtype) -> None:
    """Built where they will live, as Lightning does, in the dtype of its precision."""
    starts = []
    torch.set_default_dtype(default)
    try:
        for away in (False, True):
            torch.manual_seed(3)
            with two_devices("cuda") if away else nullcontext(), AWAY if away else nullcontext():
                model = Transformer(small_config(**STARTS[name]))
                parameters = dict(model.named_parameters())
            assert all(isinstance(weight, Away) == away for weight in parameters.values())
            starts.append({key: numbers(weight).clone() for key, weight in parameters.items()})
    finally:
        torch.set_default_dtype(torch.float32)
    for key, weight in starts[0].items():
        assert torch.equal(starts[1][key], weight), key


def test_every_generator_is_on_its_tensor_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU refuses a generator of the CPU's, and the meta device takes any."""
    seen: list[tuple[torch.device, torch.device]] = []
    for name in ("normal_", "trunc_normal_", "uniform_"):
        fill = getattr(nn.init, name)

        def spy(tensor: torch.Tensor, *rest: Any, fill: Any = fill, **options: Any) -> Any:
            if options.get("generator") is not None:
                seen.append((tensor.device, options["generator"].device))
            return fill(tensor, *rest, **options)

        monkeypatch.setattr(nn.init, name, spy)
    with torch.device("meta"):
        model = Transformer(small_config(combine="content"))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert seen
    assert all(tensor == generator for tensor, generator in seen)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_memory_elsewhere_computes_the_same_and_mixes_nothing(name: str, kind: str) -> None:
    """Forward, commit, reset, padding, backward; then what was read is loaded back."""
    if "faiss" in name:
        pytest.importorskip("faiss")
    tokens = random_tokens(ROWS, SEGMENT * SEGMENTS)
    plain = make("model", **VARIANTS[name])
    losses, bank = train(plain, tokens)
    with two_devices(kind):
        model = make("model", **VARIANTS[name])
        send_away(model)
        other_losses, other = train(model, tokens.to(AWAY))
        assert {memory.device for memory in other.memories.values()} == {AWAY}
        found = {key: numbers(tensor) for key, tensor in other.tensors().items()}
        saved = {key: tensor.to("cpu", copy=True) for key, tensor in other.tensors().items()}
        again = model.new_memory(ROWS)
        again.load(saved)
        for key, tensor in again.tensors().items():
            assert torch.equal(numbers(tensor), found[key]), key
    torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-5)
    for key, tensor in bank.tensors().items():
        atol = 1.0 if tensor.dtype == torch.int8 else 1e-4
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=atol, msg=key)
    for key, weight in model.named_parameters():
        own = plain.get_parameter(key)
        assert (weight.grad is None) == (own.grad is None)
        if weight.grad is not None:
            torch.testing.assert_close(
                numbers(weight.grad), own.grad, rtol=1e-3, atol=1e-4, msg=key
            )


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_runs_where_its_memory_is(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "faiss" in name:
        pytest.importorskip("faiss")
    monkeypatch.setattr(policy, "has_fused_kernel", lambda: False)
    model = make("model", search=name, size=300, top_k=4)
    tokens = random_tokens(ROWS, 400)
    with two_devices(kind), torch.no_grad():
        send_away(model)
        bank, ids = model.new_memory(ROWS), tokens.to(AWAY)
        for part in ids.split(100, 1):
            bank.commit(model(part, bank).pairs, token_ids=part)
        bank.memories[1].drop(torch.tensor([20, 0], device=AWAY))
        retrieval = model(ids[:, :20], bank).retrievals[1]
        assert {x.device for x in retrieval if x is not None} == {AWAY}
        assert bool(retrieval.valid.all())
        row = torch.arange(ROWS, device=AWAY)[:, None, None, None]
        assert bool(bank.memories[1].valid()[row, retrieval.slots].all())


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_stale_pairs_are_looked_after_there(kind: str) -> None:
    settings = {"size": 40, "num_layers": 3, "layers": [0, 2], "xl_cache": 5}
    tokens, found = random_tokens(ROWS, SEGMENT * SEGMENTS), []
    for away in (False, True):
        with two_devices(kind) if away else nullcontext(), torch.no_grad():
            model = make("model", **settings)
            if away:
                send_away(model)
                tokens = tokens.to(AWAY)
            bank = model.new_memory(ROWS)
            for step, ids in enumerate(tokens.split(SEGMENT, 1)):
                bank.commit(model(ids, bank).pairs, token_ids=ids, step=step)
            model.layers[0].attention.key.weight.mul_(-1)
            drift = oldest_drift(model.encode, bank, SEGMENT)
            drop_drifted(model.encode, bank, SEGMENT, 0.5)
            refresh(model.encode, bank, SEGMENT, 7)
            for memory in bank.memories.values():
                memory.drop_written_before(3)
            stores = [memory.tensors() for memory in bank.memories.values()]
            assert {store.pop("bound").device for store in stores} == {CPU}
            tensors = [*drift, *(x for store in stores for x in store.values())]
            assert {x.device for x in tensors} == {AWAY if away else CPU}
            found.append([numbers(x).clone() for x in tensors])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    """What the tests above rely on."""
    with two_devices("mps"):
        away, alone = torch.ones(2, 3, device=AWAY), torch.ones(())
        assert float((away * alone).sum()) == 6
        with pytest.raises(RuntimeError, match="mixes devices"):
            torch.stack([away[0, 0], alone])
        with pytest.raises(RuntimeError, match="generator on another device"):
            away.normal_(generator=torch.Generator())
        with pytest.raises(TypeError, match="knows no torch"):
            away.double()
        assert torch.tensor([1, 2], device=AWAY).tolist() == [1, 2]
