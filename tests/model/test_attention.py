"""The fast model against the naive one, outputs and gradients, over segments of documents."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from build import COMBINES, VOCAB, random_tokens, small_config, small_model

from memorizing_transformers.model.attention import normalize

CASES: list[dict[str, Any]] = [
    {"combine": combine, "position_bias": bias, "xl_cache": cache}
    for combine in COMBINES
    for bias in ("none", "t5", "learned-absolute")
    for cache in (0, 3)
]
CASES += [
    {"layers": [0, 1], "combine": "joint", "xl_cache": 8},
    {"layers": [0, 1], "combine": "gate", "position_bias": "t5"},
    {"layers": [], "xl_cache": 3},
    {"size": 0, "xl_cache": 3},
    {"num_kv_heads": 4, "position_bias": "t5"},
    {"num_kv_heads": 1, "combine": "joint", "position_bias": "t5"},
    {"qk_norm": False, "combine": "content", "xl_cache": 3},
    {"qk_norm": False, "combine": "joint"},
    {"head_dim": 5, "d_ff": 11},
    {"size": 64, "top_k": 1, "combine": "fixed", "fixed_value": 1.0},
    {"size": 64, "top_k": 64, "combine": "gate"},
    {"search": "reference"},
    {"combine": "gate", "position_bias": "log", "temperature": True, "num_kv_heads": 4},
    {"combine": "evidence", "match_length": 3, "temperature": True, "size": 64},
    {"combine": "content", "match_length": 2, "candidates": 2, "size": 6},
    {"combine": "joint", "match_length": 2, "candidates": 2, "size": 64, "position_bias": "t5"},
    {"value_residual": True, "xl_cache": 3, "combine": "gate"},
    {"embedding_shortcut": True, "activation": "relu2", "layers": [0, 1], "combine": "gate"},
    {"combine": "gate", "copy": ["neighbours"], "xl_cache": 3},
    {"combine": "gate", "copy": ["neighbours", "repeats"], "copy_top_k": 2},
    {"combine": "gate", "copy": ["repeats"], "size": 12},
    # What a bias prefers need not be what the search found first.
    {"copy": ["neighbours"], "copy_top_k": 1, "match_length": 3, "size": 64, "top_k": 8},
    {"copy": ["neighbours"], "copy_top_k": 2, "position_bias": "t5", "size": 64, "top_k": 8},
    {"combine": "evidence", "copy": ["neighbours", "repeats"], "match_length": 3, "size": 64},
]


def name_of(case: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in case.items())


def repeats(case: dict[str, Any]) -> bool:
    return bool(case.get("match_length")) or "repeats" in case.get("copy", [])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fast_path_equals_naive_path(case: dict[str, Any]) -> None:
    """Four segments of five tokens: row 1 ends a document in padding, both rows begin another."""
    model = small_model(**case)
    lengths = [[5, 5], [5, 3], [5, 5], [5, 5]]
    begins = {2: [False, True], 3: [True, False]}
    bank, documents = model.new_memory(2), [naive.Document(), naive.Document()]
    upstream = torch.randn(4, 2, 5, VOCAB)
    fast_loss, naive_loss = torch.zeros(()), torch.zeros(())
    # No token twice in a row: the first layer would write twins, and either may be retrieved.
    tokens = torch.stack([torch.randperm(VOCAB)[:20] for _ in range(2)])
    if repeats(case):  # which lie in different places for the second layer
        tokens = torch.stack([torch.randperm(VOCAB)[:4].repeat(5) for _ in range(2)])
    for number, ids in enumerate(tokens.split(5, dim=1)):
        if number in begins:
            bank.reset(torch.tensor(begins[number]))
            for row, begin in enumerate(begins[number]):
                documents[row] = naive.Document() if begin else documents[row]
        mask = torch.arange(5) < torch.tensor(lengths[number])[:, None]
        output = model(ids, bank)
        bank.commit(output.pairs, mask, ids)
        fast = output.logits * mask[..., None]
        slow = naive.logits(model, ids, documents, lengths[number])
        if model.copy_head is not None:  # normalised there, up to a constant here
            fast, slow = (x.log_softmax(-1) * mask[..., None] for x in (fast, slow))
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=2e-4)
        fast_loss = fast_loss + (fast * upstream[number]).sum()
        naive_loss = naive_loss + (slow * upstream[number]).sum()

    named = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for loss in (fast_loss, naive_loss)
    ]
    for name, fast, slow in zip(named, *gradients, strict=True):
        if slow is None:
            assert fast is None or not fast.any(), name
        else:
            torch.testing.assert_close(
                fast, slow, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
            )


def test_retrieval_reports_what_the_layer_did() -> None:
    model = small_model(combine="gate")
    bank = model.new_memory(2)
    first, second = random_tokens(2, 10).split(5, dim=1)
    bank.commit(model(first, bank).pairs)
    (retrieval,) = model(second, bank).retrievals.values()
    assert retrieval.slots.shape == retrieval.weights.shape == (2, 4, 5, 3)
    assert retrieval.valid.all()
    torch.testing.assert_close(retrieval.weights.sum(-1), torch.ones(2, 4, 5))
    gate = model.layers[1].attention.reader.gate.logit.detach().sigmoid()
    assert torch.equal(retrieval.share, gate[:, None].expand(2, 4, 5))
    keys = bank.memories[1].keys.repeat_interleave(2, dim=1)
    expected = (retrieval.queries @ keys.transpose(-1, -2))[..., :5].topk(3).indices
    assert torch.equal(retrieval.slots, expected)
    assert not any(tensor.requires_grad for tensor in retrieval if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("search", ["exact", "bucketed", "reference"])
def test_bf16_mixed_searches_in_fp32(search: str, dtype: str) -> None:
    """Scores rounded to bf16 would confuse most of a few hundred neighbours."""
    config = small_config(size=400, top_k=8, search=search, d_model=64)
    config.memory.dtype, config.memory.recall_target = dtype, 0.999
    model = small_model(config)
    bank = model.new_memory(2)
    with torch.autocast("cpu", torch.bfloat16):
        for ids in random_tokens(2, 400).split(100, dim=1):
            bank.commit(model(ids, bank).pairs)
        retrieval = model(random_tokens(2, 20, seed=1), bank).retrievals[1]
    keys = bank.memories[1].keys.float().repeat_interleave(2, dim=1)
    scores = retrieval.queries.float() @ keys.transpose(-1, -2)
    expected = scores.topk(8).values
    torch.testing.assert_close(scores.gather(-1, retrieval.slots), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", COMBINES)
def test_only_queries_scale_gate_and_bias_feel_the_memory(combine: str) -> None:
    """Gradient passes through the retrieved part of the output, never into stored pairs."""
    model = small_model(combine=combine, position_bias="t5")
    bank = model.new_memory(1)
    for ids in random_tokens(1, 10).split(5, dim=1):
        bank.commit(model(ids, bank).pairs)
    memory = bank.memories[1]
    memory.keys.requires_grad_()
    memory.values.requires_grad_()
    model(random_tokens(1, 5, seed=1), bank).logits.square().sum().backward()
    attention = model.layers[1].attention
    assert memory.keys.grad is None
    assert memory.values.grad is None
    felt = [attention.query.weight, attention.scale, *attention.reader.parameters()]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in felt)


def test_normalize_gives_unit_length_in_fp32_and_survives_zero() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert normalize(x).dtype == torch.float32
    torch.testing.assert_close(normalize(x).norm(dim=-1), torch.ones(3), atol=1e-5, rtol=0)
    zero = torch.zeros(1, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(normalize(zero).sum(), zero)
    assert gradient.isfinite().all()


def test_memory_parameters_are_the_gate_and_the_bias() -> None:
    for combine, names in {"gate": {"gate.logit"}, "fixed": set(), "joint": set()}.items():
        model = small_model(small_config(combine=combine))
        found = {id(parameter) for parameter in model.memory_parameters()}
        named = {n for n, p in model.named_parameters() if id(p) in found}
        assert named == {f"layers.1.attention.reader.{name}" for name in names}
    model = small_model(combine="content", position_bias="t5")
    found = {id(parameter) for parameter in model.memory_parameters()}
    assert {n for n, p in model.named_parameters() if id(p) in found} == {
        "layers.1.attention.reader.gate.linear.weight",
        "layers.1.attention.reader.gate.linear.bias",
        "layers.1.attention.reader.bias.table.weight",
    }
