"""Which errors of a kernel lead to another kernel."""

from __future__ import annotations

import sys
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch

from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search import policy
from memorizing_transformers.memory.search.policy import KernelFailed


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Failed to find C compiler"), KernelFailed),
        (CalledProcessError(1, ["gcc", "main.c"]), KernelFailed),
        (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), KernelFailed),
        (AssertionError("libcuda.so cannot found!\nPossible files are located at"), KernelFailed),
        (RuntimeError("a shape that cannot be"), RuntimeError),
        (AssertionError("a shape that cannot be"), AssertionError),
        (AssertionError(), AssertionError),
    ],
    ids=str,
)
def test_only_a_kernel_that_cannot_start_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object) -> Neighbours:
        raise error

    folder = policy.__name__.rpartition(".")[0]
    triton = SimpleNamespace(TritonError=type("TritonError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "triton", triton)
    kernels = SimpleNamespace(triton_buckets=fail)
    monkeypatch.setitem(sys.modules, f"{folder}.kernels.triton_buckets", kernels)
    memory = Memory(1, 1, 32, 16)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        policy._triton(torch.randn(1, 1, 4, 16), memory, 1, 32, 2**20)
    assert raised.type is kind
    assert "\n" not in str(raised.value)
