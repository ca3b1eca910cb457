"""Conditions of a GPU run that a CPU can meet too: inference mode, autocast, compiled kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import VOCAB, small_model
from torch import Tensor

from memorizing_transformers.model import flex
from memorizing_transformers.model.config import MemoryConfig
from memorizing_transformers.model.copying import CopyInputs, NeighbourCopies
from memorizing_transformers.model.gates import Evidence, EvidenceGate
from memorizing_transformers.pretrained.hook import softmax_attention


def test_a_mask_that_validation_made_can_be_saved_for_a_backward_pass() -> None:
    """Lightning validates in inference mode before it trains, and the mask is kept."""
    flex.causal_blocks.cache_clear()
    with torch.inference_mode():
        mask = flex.causal_blocks(128, 256, torch.device("cpu"))
    tensors = [x for x in vars(mask).values() if isinstance(x, Tensor)]
    assert tensors
    assert not any(x.is_inference() for x in tensors)


@pytest.mark.parametrize("old", [False, True], ids=["", "torch 2.11"])
def test_a_kernel_is_made_for_the_first_shape_of_its_kind(
    old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def compiler(function: Any, *, dynamic: bool | None, isolate_recompiles: bool = False) -> Any:
        assert isolate_recompiles
        made.append(dynamic)
        return len(made)

    def older(function: Any, *, dynamic: bool | None) -> Any:
        made.append(dynamic)
        return len(made)

    monkeypatch.setattr(torch, "compile", older if old else compiler)
    monkeypatch.setattr(flex, "_FIRST_SHAPES", {})
    flex._compiled.cache_clear()
    try:
        shapes = [(1, 128), (8, 512), (8, 512), (4, 512), (2, 512)]
        kinds = ["trial", "train", "train", "train", "train"]
        found = [flex._kernel((kind,), shape) for kind, shape in zip(kinds, shapes, strict=True)]
    finally:
        flex._compiled.cache_clear()
    assert found == [1, 2, 2, 3, 3]
    assert made == [False, False, None]


def test_a_model_is_compiled_by_a_torch_that_cannot_count_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, made = torch.compile, []

    def older(model: Any, *, fullgraph: bool = False, dynamic: bool | None = None) -> Any:
        made.append(fullgraph)
        return real(model, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", older)
    model, plain, ids = small_model(compile=True), small_model(), torch.randint(VOCAB, (2, 5))
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    found, wanted = (x.score(ids[:, :-1], x.new_memory(2), ids[:, 1:]).nll for x in (model, plain))
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted)
    assert made == [True]
    assert not [x for x in caplog.records if x.name.startswith("memorizing_transformers")]


def test_scores_are_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    given = q, k, v, None, 6, 20.0
    with torch.autocast("cpu", torch.bfloat16):
        found = softmax_attention(*given)
    for ours, expected in zip(found, softmax_attention(*given), strict=True):
        assert torch.equal(ours, expected)

    gate = EvidenceGate(4, 16, MemoryConfig())
    with torch.no_grad():
        gate.hidden.normal_()
    masses = Evidence(*(torch.randn(2, 4, 8) for _ in range(4)))
    with torch.autocast("cpu", torch.bfloat16):
        share = gate.share(q[:, 0], masses)
    assert torch.equal(share, gate.share(q[:, 0], masses))


def test_a_slot_that_is_not_valid_may_have_any_number() -> None:
    """A kernel numbers the place of an empty bucket, which may be beyond the memory's end."""
    torch.manual_seed(0)
    model = small_model(copy=["neighbours"])
    copies = next(x for x in model.modules() if isinstance(x, NeighbourCopies))
    bank, ids = model.new_memory(2), torch.randint(VOCAB, (2, 4))
    output = model(ids, bank)
    bank.commit(output.pairs, token_ids=ids)
    output = model(ids, bank)
    (retrieval,) = output.retrievals.values()
    hidden = torch.randn(2, 4, 16)
    memory = bank.memories[max(bank.memories)]
    candidates = []
    for number in (0, 10**9):
        found = retrieval._replace(
            valid=retrieval.valid.index_fill(3, torch.tensor([1]), False),
            slots=retrieval.slots.index_fill(3, torch.tensor([1]), number),
        )
        candidates.append(copies.candidates(CopyInputs(hidden, ids, memory, found, VOCAB)).tokens)
    assert torch.equal(*candidates)
