"""The model as a whole: its start, its numbers, its loss, and recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import COMBINES, VOCAB, random_tokens, read, small_config, small_model
from torch import Tensor

from memorizing_transformers.memory import Memory, MemoryBank
from memorizing_transformers.model import Transformer


def start(seed: int = 3, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(Transformer(small_config(**settings)).named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": []},
        {"layers": [0, 1]},
        {"size": 0},
        {"combine": "content"},
        {"combine": "joint", "position_bias": "t5"},
        {"xl_cache": 5},
        {"qk_norm": False},
        {"num_layers": 4},
    ],
    ids=str,
)
def test_variants_of_a_seed_begin_alike(settings: dict[str, Any]) -> None:
    default, variant = start(), start(**settings)
    shared = default.keys() & variant.keys()
    assert "layers.1.attention.query.weight" in shared
    for name in shared:
        assert torch.equal(default[name], variant[name]), name


def test_seeds_begin_differently_and_so_do_layers() -> None:
    first, second = start(0), start(1)
    for name, weight in first.items():
        if weight.std() > 0:
            assert not torch.equal(weight, second[name]), name
    for name in ("query", "output"):
        names = [f"layers.{layer}.attention.{name}.weight" for layer in range(2)]
        assert not torch.equal(*(first[name] for name in names))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1, 2**64 - 1])
def test_any_seed_will_do(seed: int) -> None:
    assert all(weight.isfinite().all() for weight in start(seed).values())


def test_the_start_has_the_stated_spread() -> None:
    weights = start(d_model=128)
    assert abs(weights["embedding.weight"].std() - 1) < 0.05
    kernel = weights["layers.0.feed_forward.3.weight"]
    assert abs(kernel.std() - kernel.shape[1] ** -0.5) < 0.02 * kernel.shape[1] ** -0.5
    assert not weights["layers.0.attention.bias.table.weight"].any()


def test_the_gate_begins_where_the_config_says() -> None:
    config = small_config(combine="gate")
    config.memory.gate_init = 0.1
    gate = Transformer(config).layers[1].attention.reader.gate.logit
    torch.testing.assert_close(gate.sigmoid(), torch.full((4,), 0.1))


def test_zeroed_outputs_leave_the_embedding_alone() -> None:
    model = Transformer(small_config(zero_init_outputs=True))
    ids = random_tokens(2, 5)
    hidden = model.norm(model.embedding(ids)) * model.config.d_model**-0.5
    torch.testing.assert_close(model(ids).logits, hidden @ model.embedding.weight.T)
    others = Transformer(small_config()).state_dict()
    for name, weight in model.state_dict().items():
        last = name.endswith(("attention.output.weight", "feed_forward.3.weight"))
        assert torch.equal(weight, torch.zeros_like(weight) if last else others[name])


@pytest.mark.parametrize("embedding_shortcut", [True, False])
def test_values_of_layer_0_get_a_gradient_from_later_layers(embedding_shortcut: bool) -> None:
    model = small_model(
        value_residual=True, embedding_shortcut=embedding_shortcut, layers=[], num_layers=3
    )
    model.layers[0].attention.output.weight.data.zero_()  # then layer 0 itself passes on nothing
    model(random_tokens(2, 5)).logits.square().sum().backward()
    assert model.layers[0].attention.value.weight.grad.any()
    shares = [layer.attention.value_share for layer in model.layers]
    assert shares[0] is None
    assert all(share.grad.any() for share in shares[1:])
    if embedding_shortcut:
        assert all(layer.shortcut.grad.any() for layer in model.layers[1:])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("xl_cache", [0, 4])
def test_recomputation_changes_neither_loss_nor_gradients(combine: str, xl_cache: int) -> None:
    """Though the segment is committed, as in training, before the backward pass recomputes."""
    settings = {"combine": combine, "xl_cache": xl_cache, "num_layers": 3, "position_bias": "t5"}
    settings |= {"value_residual": True, "embedding_shortcut": True}
    tokens = random_tokens(2, 21)
    results = []
    for recompute in (False, True):
        model = small_model(**settings, activation_checkpointing=recompute)
        bank = model.new_memory(2)
        with torch.no_grad():
            read(model, bank, random_tokens(2, 10, seed=1), 5)
        outcome = []
        for ids, targets in zip(tokens[:, :-1].split(5, 1), tokens[:, 1:].split(5, 1), strict=True):
            output = model(ids, bank)
            loss = model.loss(output.logits, targets)
            bank.commit(output.pairs)
            loss.backward()
            outcome.append(loss.detach())
        results.append((outcome, [p.grad for p in model.parameters()]))
    for plain, recomputed in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(plain, recomputed)
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "only gate and bias trained"])
@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_do_not_depend_on_what_comes_before_backward(combine: str, frozen: bool) -> None:
    """The ring is overwritten in place, while the backward pass needs what was read."""
    gradients = []
    for changes in (0, 1, 4, "load"):
        model = small_model(combine=combine, xl_cache=4, position_bias="t5")
        bank = model.new_memory(2)
        read(model, bank, random_tokens(2, 10, seed=1), 5)
        wanted = model.memory_parameters() if frozen else list(model.parameters())
        model.requires_grad_(not frozen)
        for parameter in wanted:
            parameter.requires_grad_()
        output = model(random_tokens(2, 5), bank)
        if changes == "load":
            other = model.new_memory(2)
            read(model, other, random_tokens(2, 10, seed=2), 5)
            bank.load(other.tensors())
        for change in range(changes if isinstance(changes, int) else 0):
            bank.commit(output.pairs)
            bank.reset(torch.tensor([change == 1, change == 2]))
        after = {name: tensor.clone() for name, tensor in bank.tensors().items()}
        loss = output.logits.square().sum()
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for name, tensor in bank.tensors().items():
            assert torch.equal(tensor, after[name]), name
        gradients.append(first)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_one_loss_over_several_committed_segments_has_the_gradient_of_their_sum() -> None:
    tokens = random_tokens(2, 25)
    results = []
    for together in (False, True):
        model = small_model(position_bias="t5", combine="joint")
        bank, losses = model.new_memory(2), []
        for ids in tokens.split(5, dim=1):
            output = model(ids, bank)
            bank.commit(output.pairs)
            losses.append(output.logits.square().sum())
            if not together:
                losses.pop().backward()
        if together:
            torch.stack(losses).sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for apart, together in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-4)


def test_recomputation_draws_the_same_dropout() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = small_model(dropout=0.3, activation_checkpointing=recompute)
        bank = model.new_memory(1)
        read(model, bank, random_tokens(1, 10), 5)
        loss = model(random_tokens(1, 5, seed=1), bank).logits.square().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_evaluation_drops_nothing() -> None:
    model = small_model(dropout=0.5).eval()
    ids = random_tokens(1, 5)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk norm", "no qk norm"])
@pytest.mark.parametrize("combine", COMBINES)
def test_bf16_mixed_stays_near_fp32(combine: str, qk_norm: bool) -> None:
    model = small_model(combine=combine, qk_norm=qk_norm, xl_cache=4, top_k=8, size=64, d_model=32)
    tokens = random_tokens(4, 33)
    losses = []
    for enabled in (False, True):
        bank = model.new_memory(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = read(model, bank, tokens[:, :-1], 8)
            assert outputs[0].logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = model.loss(torch.cat([o.logits for o in outputs], 1), tokens[:, 1:])
        assert loss.dtype == torch.float32
        assert bank.memories[1].keys.dtype == torch.float32
        loss.backward()
        losses.append(loss.detach())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(losses[1], losses[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("small", ["bfloat16", "int8"])
def test_a_memory_in_a_small_dtype_stays_near_fp32(small: str) -> None:
    results = []
    for dtype in ("float32", small):
        config = small_config(top_k=64, size=64)
        config.memory.dtype = dtype
        model = small_model(config)
        bank = model.new_memory(2)
        assert str(bank.memories[1].keys.dtype) == f"torch.{dtype}"
        results.append(read(model, bank, random_tokens(2, 20), 5)[-1].logits)
    torch.testing.assert_close(results[1], results[0], atol=0.05, rtol=0)
    assert not torch.equal(results[1], results[0])


def test_the_bank_has_what_the_config_says() -> None:
    bank = small_model(layers=[0, -1], num_layers=3, size=9, xl_cache=4).new_memory(5)
    assert set(bank.memories) == {0, 2}
    assert set(bank.caches) == {0, 1, 2}
    assert bank.memories[0].keys.shape == (5, 2, 9, 4)
    assert bank.caches[0].keys.shape == (5, 2, 4, 4)
    assert small_model(size=0).new_memory(2).tensors() == {}


def test_pairs_to_commit_carry_no_history() -> None:
    model, ids = small_model(), random_tokens(2, 5)
    output = model(ids, model.new_memory(2))
    assert output.logits.requires_grad
    assert not any(tensor.requires_grad for pair in output.pairs.cache.values() for tensor in pair)


def test_the_bank_stays_out_of_the_module() -> None:
    model = small_model(xl_cache=4)
    before = set(model.state_dict())
    read(model, model.new_memory(2), random_tokens(2, 10), 5)
    assert set(model.state_dict()) == before == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bank_of_other_rows_is_refused(rows: int) -> None:
    """Else row 1 might read the memory of row 0, which broadcasts."""
    model = small_model()
    bank = model.new_memory(rows)
    with pytest.raises(ValueError, match=f"bank of {rows} rows got 2 rows"):
        model(random_tokens(2, 5), bank)


def test_without_a_memory_for_its_layer_the_model_is_plain() -> None:
    model, ids = small_model(), random_tokens(2, 5)
    assert torch.equal(model(ids, MemoryBank(2)).logits, model(ids).logits)
    assert model(ids).retrievals == {}


def test_a_memory_of_another_layer_is_left_alone() -> None:
    model, ids = small_model(), random_tokens(2, 5)
    bank = MemoryBank(2, {0: Memory(2, 2, 7, 4)})
    bank.commit(model(ids).pairs)
    assert torch.equal(model(ids, bank).logits, model(ids).logits)


def test_loss_counts_only_what_counts() -> None:
    logits, targets = torch.randn(2, 5, VOCAB), random_tokens(2, 5)
    targets[0, 3:] = -100
    per_token = Transformer.loss(logits, targets, "none")
    assert per_token.shape == (2, 5)
    assert not per_token[0, 3:].any()
    log_probabilities = logits.double().log_softmax(-1)
    expected = torch.stack(
        [-log_probabilities[r, t, targets[r, t]] for r, t in (targets >= 0).nonzero()]
    )
    torch.testing.assert_close(per_token[targets >= 0].double(), expected)
    torch.testing.assert_close(Transformer.loss(logits, targets).double(), expected.mean())
    torch.testing.assert_close(Transformer.loss(logits, targets, "sum").double(), expected.sum())


def test_loss_is_computed_in_fp32() -> None:
    logits, targets = torch.randn(2, 5, VOCAB).bfloat16(), random_tokens(2, 5)
    expected = Transformer.loss(logits.float(), targets)
    assert torch.equal(Transformer.loss(logits, targets), expected)


def test_output_and_input_embeddings_are_one() -> None:
    model = small_model()
    names = [n for n, p in model.named_parameters() if p.shape == (VOCAB, 16)]
    assert names == ["embedding.weight"]
