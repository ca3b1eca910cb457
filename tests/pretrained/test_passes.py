"""A pass reads its own segment, however late a layer is computed again; then nothing reads one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from memorizing_transformers import MemorizedModel, memorize
from memorizing_transformers.errors import ConfigError

IDS = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(3))


def model_of(family: str = "llama", **options: Any) -> MemorizedModel:
    return memorize(tiny(family), {"size": 40, "top_k": 4}, layers=[1], xl_cache=4, **options)


def checkpoint(model: MemorizedModel, how: str) -> None:
    if how == "wrapped":
        base: Any = model.base
        layers = {*(base.transformer.h if hasattr(base, "transformer") else base.model.layers)}
        apply_activation_checkpointing(model.base, check_fn=lambda module: module in layers)
    elif how != "none":
        again = {"use_reentrant": how == "reentrant"}
        model.base.activation_checkpointing_enable(again)  # type: ignore[operator]


def gradients(family: str, how: str, segments: int) -> Tensor:
    """Of several segments, the first of which only fills the memory, with one backward pass."""
    model = model_of(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpoint(model, how)
    bank, losses = model.new_memory(2), []
    for segment in IDS.split(8, 1)[: segments + 1]:
        output = model(segment, bank)
        losses.append(model.loss(output.logits, segment))
        bank.commit(output.pairs, token_ids=segment)
    with torch.no_grad():
        model.eval()(IDS[:, :8], model.new_memory(2))  # one more pass in between
        model.train()
    torch.stack(losses[1:]).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("how", ["plain", "reentrant", "wrapped"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_are_computed_again_read_what_they_read_first(
    family: str, how: str, segments: int
) -> None:
    expected = gradients(family, "none", segments)
    torch.testing.assert_close(gradients(family, how, segments), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["none", "plain"])
def test_after_a_pass_the_base_reads_no_memory(how: str) -> None:
    plain = tiny("llama")(IDS[:, 8:16]).logits
    model = model_of().train()
    checkpoint(model, how)
    bank = model.new_memory(2)
    first = model(IDS[:, :8], bank)
    bank.commit(first.pairs, token_ids=IDS[:, :8])
    output = model(IDS[:, 8:16], bank)
    assert not torch.allclose(output.logits, plain, atol=1e-4)
    for mode in (True, False):
        assert torch.equal(model.train(mode).base(IDS[:, 8:16]).logits, plain)
    model.train()
    model.loss(output.logits, IDS[:, 8:16]).backward()
    assert torch.equal(model.base(IDS[:, 8:16]).logits, plain)
    with pytest.raises(RuntimeError):
        model(IDS[:, :8].float(), bank)  # it fails
    assert torch.equal(model.base(IDS[:, 8:16]).logits, plain)


@pytest.mark.parametrize(
    ("option", "with_bank"), [("labels", True), ("labels", False), ("position_ids", True)]
)
def test_an_option_that_would_mean_something_else_is_refused(option: str, with_bank: bool) -> None:
    model = model_of()
    bank = model.new_memory(2) if with_bank else None
    with pytest.raises(ConfigError, match=f"^{option} = ") as caught:
        model(IDS, bank, **{option: IDS})
    assert "\n" not in str(caught.value)
