"""A pretrained model with a memory: what holds for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny
from torch import Tensor

from memorizing_transformers import memorize
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.pretrained.memorized import MemorizedModel

ALL = [*FAMILIES, "gpt2"]
N = 8


def tokens(rows: int, count: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, count))


@torch.no_grad()
def read(model: MemorizedModel, ids: Tensor, segment: int = N) -> Tensor:
    """Logits of a text that is read segment by segment."""
    bank, logits = model.new_memory(len(ids)), []
    for start in range(0, ids.shape[1], segment):
        part = ids[:, start : start + segment]
        output = model(part, bank)
        bank.commit(output.pairs, token_ids=part)
        logits.append(output.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def full(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize("family", ALL)
def test_off_is_the_model_as_it_was(family: str) -> None:
    base, ids = tiny(family), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = [full(base, ids), base(ids, attention_mask=mask).logits]
    model = memorize(copy.deepcopy(base), {"size": 32, "top_k": 4}, layers=[1], xl_cache=8)
    read(model, ids)
    assert torch.equal(full(model, ids), expected[0])
    assert torch.equal(model(ids, attention_mask=mask).logits, expected[1])
    assert torch.equal(full(model.base, ids), expected[0])


@pytest.mark.parametrize("xl_cache", [0, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_that_retrieves_everything_is_full_attention(family: str, xl_cache: int) -> None:
    base, ids = tiny(family, layers=1), tokens(2, 5 * N)
    expected = full(base, ids)
    memory = {"size": 64, "top_k": 64, "combine": "joint"}
    model = memorize(base, memory, layers=[0], xl_cache=xl_cache, skip_first=0)
    assert torch.allclose(read(model, ids), expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_everything_is_full_attention(family: str) -> None:
    base, ids = tiny(family, layers=3), tokens(2, 4 * N)
    expected = full(base, ids)
    model = memorize(base, {"size": 0}, layers=[], xl_cache=5 * N)
    assert torch.allclose(read(model, ids), expected, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_at_the_right_changes_nothing_and_elsewhere_it_is_refused(family: str) -> None:
    model = memorize(tiny(family), {"size": 32, "top_k": 4}, layers=[1], xl_cache=4)
    ids, bank = tokens(2, N), model.new_memory(2)
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, 5:] = 0
    output = model(ids, bank, attention_mask=mask)
    bank.commit(output.pairs, mask.bool(), ids)
    other = ids.clone()
    other[1, 5:] = tokens(1, 3)
    again = model(other, model.new_memory(2), attention_mask=mask)
    assert torch.equal(again.logits[1, :5], output.logits[1, :5])
    alone = model.new_memory(1)
    alone.commit(model(ids[1:, :5], alone).pairs, token_ids=ids[1:, :5])
    following = tokens(1, N)
    expected = model(following, alone).logits[0]
    assert torch.allclose(model(following.repeat(2, 1), bank).logits[1], expected, atol=1e-4)
    with pytest.raises(ConfigError, match="padding must be at the right"):
        model(ids, bank, attention_mask=mask.flip(1))


def test_rows_read_their_own_memory_and_a_cleared_row_is_as_new() -> None:
    model = memorize(tiny("llama"), {"size": 32, "top_k": 4}, layers=[0, 1], xl_cache=4)
    first, second = tokens(2, N), tokens(2, N)
    bank = model.new_memory(2)
    bank.commit(model(first, bank).pairs, token_ids=first)
    other = first.clone()
    other[0] = tokens(1, N)
    changed = model.new_memory(2)
    changed.commit(model(other, changed).pairs, token_ids=other)
    assert torch.equal(model(second, bank).logits[1], model(second, changed).logits[1])
    assert not torch.allclose(model(second, bank).logits[0], model(second, changed).logits[0])
    bank.reset(torch.tensor([True, False]))
    fresh = model(second, model.new_memory(2)).logits[0]
    assert torch.equal(model(second, bank).logits[0], fresh)


def test_no_token_sees_what_comes_after_it() -> None:
    model = memorize(tiny("llama"), {"size": 32, "top_k": 4}, layers=[0, 1], xl_cache=4)
    ids = tokens(1, 3 * N)
    other = ids.clone()
    other[0, 2 * N + 3 :] = tokens(1, N - 3)
    seen = 2 * N + 3
    assert torch.equal(read(model, ids)[:, :seen], read(model, other)[:, :seen])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_memories_of_every_dtype_are_read(dtype: str) -> None:
    memory = {"size": 64, "top_k": 64, "combine": "joint", "dtype": dtype}
    ids = tokens(2, 4 * N)
    expected = full(tiny("llama", layers=1), ids)
    found = read(memorize(tiny("llama", layers=1), memory, layers=[0], skip_first=0), ids)
    tolerance = 1e-4 if dtype == "float32" else 0.3
    assert torch.allclose(found, expected, atol=tolerance)


def gradients(checkpointing: bool, early: bool, size: int = 12) -> list[Tensor]:
    """Of the second segment's loss; the memory is written before the backward pass or after."""
    torch.manual_seed(1)
    model = memorize(tiny("llama"), {"size": size, "top_k": 4}, layers=[0, 1], xl_cache=4)
    model.train()
    if checkpointing:
        model.base.activation_checkpointing_enable()  # type: ignore[operator]
    first, second = tokens(2, N), tokens(2, N)
    bank = model.new_memory(2)
    bank.commit(model(first, bank).pairs, token_ids=first)
    output = model(second, bank)
    if early:
        bank.commit(output.pairs, token_ids=second)
    output.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.memory_parameters())
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_after_the_commit_sees_what_was_read(checkpointing: bool) -> None:
    expected = gradients(checkpointing=False, early=False)
    found = gradients(checkpointing=checkpointing, early=True)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_a_step_of_the_memorys_own_numbers_makes_the_loss_smaller(family: str) -> None:
    model = memorize(tiny(family), {"size": 64, "top_k": 8}, layers=[1], xl_cache=4).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    own = [parameter.requires_grad_() for parameter in model.memory_parameters()]
    ids = tokens(1, 2 * N + 1).repeat(2, 2)
    losses = []
    for _ in range(2):
        bank, loss = model.new_memory(2), torch.tensor(0.0)
        for start in range(0, ids.shape[1] - 1, N):
            inputs, targets = ids[:, start : start + N], ids[:, start + 1 : start + N + 1]
            inputs = inputs[:, : targets.shape[1]]
            output = model(inputs, bank)
            loss = loss + model.loss(output.logits, targets)
            bank.commit(output.pairs, token_ids=inputs)
        gradients = torch.autograd.grad(loss, own)
        assert any(gradient.any() for gradient in gradients)
        losses.append(float(loss.detach()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter -= 0.005 * gradient / norm
    assert losses[1] < losses[0]


def test_a_model_gets_one_memory_only() -> None:
    base, ids = tiny("llama"), tokens(1, N)
    expected = full(base, ids)
    model = memorize(base, {"size": 32, "top_k": 4}, layers=[1])
    for layers in ([0], "auto"):
        with pytest.raises(ConfigError, match="has a memory already"):
            memorize(base, {"size": 32, "top_k": 4}, layers=layers)
    assert torch.equal(full(model, ids), expected)


def test_a_model_of_peft_is_taken_as_it_is() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base, ids = peft.get_peft_model(tiny("llama"), settings), tokens(2, 3 * N)
    merged = copy.deepcopy(base).merge_and_unload()
    expected = full(base, ids)
    model = memorize(base, {"size": 64, "top_k": 4}, layers=[1])
    assert torch.equal(full(model, ids), expected)
    assert not torch.allclose(read(model, ids), expected, atol=1e-3)
    merged = memorize(merged, {"size": 64, "top_k": 4}, layers=[1])
    assert torch.allclose(read(model, ids), read(merged, ids), atol=1e-3)


@pytest.mark.parametrize("position", ["distance", "start"])
def test_keys_are_never_farther_than_the_model_was_trained_on(position: str) -> None:
    base = tiny("llama", layers=1, max_position_embeddings=3 * N)
    model = memorize(base, {"size": 256, "top_k": 4}, layers=[0], position=position)
    model.eval()
    bank = model.new_memory(1)
    for _ in range(10):
        ids = tokens(1, N)
        bank.commit(model(ids, bank).pairs, token_ids=ids)
    asked: list[Tensor] = []
    original = type(base.model.rotary_emb).forward

    def watched(module, x, position_ids, **options):  # type: ignore[no-untyped-def]
        asked.append(position_ids)
        return original(module, x, position_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base.model.rotary_emb), "forward", watched)
        model(tokens(1, N), bank)
    least = min(int(places.min()) for places in asked)
    assert least == (-2 * N if position == "distance" else 0)


@pytest.mark.parametrize("family", ["bloom", "gptj", "falcon"])
def test_other_families_are_refused_in_one_line(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    with pytest.raises(ConfigError, match=f"memorize = '{family}'.*attention interface") as caught:
        memorize(model, layers=[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": [2]}, "memory.layers = .2."),
        ({"layers": [0], "position": "near"}, "position"),
        ({"layers": [0], "xl_cache": -1}, "xl_cache"),
        ({"layers": [0], "skip_first": -1}, "skip_first"),
        ({"layers": [0], "memory": {"copy": ["repeats"]}}, "memory.copy"),
        ({"layers": [0], "memory": {"position_bias": "t5"}}, "memory.position_bias"),
        ({"layers": [0], "memory": {"size": 4, "top_k": 8}}, "memory.top_k"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        memorize(tiny("llama"), **settings)
