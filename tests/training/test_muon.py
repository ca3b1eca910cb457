"""Muon for the matrices of the layers, AdamW for the rest: as torch's own two would do it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.training import muon as muon_module
from memorizing_transformers.training.muon import is_layer_matrix, orthogonalised
from memorizing_transformers.training.optimizers import (
    OptimizerConfig,
    is_memory_number,
    make_optimizer,
    parameter_groups,
)

MATRICES = {
    f"layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in (
        *(f"attention.{name}" for name in ("query", "key", "value", "output")),
        "feed_forward.1",
        "feed_forward.3",
    )
}


def small() -> Transformer:
    memory = {"size": 8, "top_k": 2, "combine": "content", "copy": ["neighbours"]}
    return Transformer(ModelConfig(23, 16, 2, 4, memory=memory, value_residual=True))


def with_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_gets_the_matrices_of_the_layers_alone() -> None:
    config = OptimizerConfig("muon", memory_lr_factor=10)
    groups = parameter_groups(small().named_parameters(), config)
    found = {name for name, _ in groups[-1]["params"]}
    assert groups[-1]["matrices"]
    assert found == MATRICES
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in small().named_parameters())


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("transformer.h.0.attn.c_attn.weight", True),
        ("model.layers.3.self_attn.q_proj.lora_A.default.weight", True),
        ("lm_head.weight", False),
        ("model.embed_tokens.weight", False),
        ("layers.0.attention.bias.table", False),
        ("layers.0.attention.bias.table.weight", False),
    ],
)
def test_kernels_by_their_names(name: str, inside: bool) -> None:
    assert is_layer_matrix(name, nn.Parameter(torch.zeros(2, 2))) is inside


@pytest.mark.parametrize("fast_bfloat16", [True, False])
def test_steps_are_those_of_the_two_optimisers_of_torch(
    fast_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_module, "has_fast_bfloat16", lambda: fast_bfloat16)
    start = {name: p.detach().clone() for name, p in small().named_parameters()}
    ours, other = small(), small()
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = make_optimizer(ours, OptimizerConfig("muon", **settings))
    named = dict(other.named_parameters())
    kernels = [named[name] for name in named if name in MATRICES]
    others = {name: p for name, p in named.items() if name not in MATRICES}
    vectors = [p for name, p in others.items() if p.ndim < 2 or is_memory_number(name)]
    rest = [p for name, p in others.items() if not (p.ndim < 2 or is_memory_number(name))]
    muon = torch.optim.Muon(kernels, adjust_lr_fn="match_rms_adamw", **settings)
    groups = [{"params": rest}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), **settings)
    for seed in range(3):
        for net in (ours, other):
            with_gradients(net, seed)
        for one in (optimizer, muon, adamw):
            one.step()
    for (name, mine), theirs in zip(ours.named_parameters(), other.parameters(), strict=True):
        if fast_bfloat16 or name not in MATRICES:
            assert torch.equal(mine, theirs), name
        else:
            # torch rounds its iteration to bf16.
            moved, rounded = mine - start[name], theirs - start[name]
            assert (moved - rounded).norm() < 0.02 * rounded.norm(), name


@pytest.mark.parametrize("shape", [(12, 12), (7, 30), (30, 7)])
def test_singular_values_take_the_steps_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix, (a, b, c) = torch.randn(shape, dtype=torch.float64), (3.4445, -4.775, 2.0315)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalised(matrix, (a, b, c), 5, 1e-7)
    assert torch.allclose(found, left @ torch.diag(values) @ right, atol=1e-9)


def test_of_a_zero_gradient_comes_zero() -> None:
    assert not orthogonalised(torch.zeros(3, 4), (3.4445, -4.775, 2.0315), 5, 1e-7).any()


@pytest.mark.parametrize("fast_bfloat16", [True, False])
def test_a_saved_state_goes_on(fast_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_module, "has_fast_bfloat16", lambda: fast_bfloat16)
    whole, stopped = small(), small()
    config = OptimizerConfig("muon", lr=0.02)
    optimizer = make_optimizer(whole, config)
    for seed in range(2):
        with_gradients(whole, seed)
        optimizer.step()
    stopped.load_state_dict(whole.state_dict())
    resumed = make_optimizer(stopped, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, one in ((whole, optimizer), (stopped, resumed)):
        with_gradients(net, 9)
        one.step()
    for mine, theirs in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(mine, theirs)
