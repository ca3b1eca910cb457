"""Which errors of a kernel lead to another kernel."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search import policy
from memorizing_transformers.memory.search.policy import KernelFailed


@pytest.mark.parametrize(
    ("message", "kind"),
    [("Failed to find C compiler", KernelFailed), ("a shape that cannot be", RuntimeError)],
)
def test_only_a_missing_compiler_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, message: str, kind: type[Exception]
) -> None:
    def fail(*_: object) -> Neighbours:
        raise RuntimeError(message)

    folder = policy.__name__.rpartition(".")[0]
    triton = SimpleNamespace(TritonError=type("TritonError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "triton", triton)
    kernels = SimpleNamespace(triton_buckets=fail)
    monkeypatch.setitem(sys.modules, f"{folder}.kernels.triton_buckets", kernels)
    memory = Memory(1, 1, 32, 16)
    with pytest.raises(Exception, match=message) as error:
        policy._triton(torch.randn(1, 1, 4, 16), memory, 1, 32, 2**20)
    assert error.type is kind
