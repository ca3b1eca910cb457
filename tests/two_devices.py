"""A second device on a machine that has one: tensors of real numbers that say they are elsewhere.

Within ``TwoDevices`` tensors on ``AWAY`` compute as those on the CPU do, and an operation that
mixes the two raises, as it would with a GPU. Torch's own fake tensors cannot serve here: autograd
refuses them on a build without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

AWAY = torch.device("meta")
"""What a tensor on the second device says; of all devices' autograd runs this one's on the CPU."""
CPU = torch.device("cpu")
aten = torch.ops.aten


class Away(Tensor):
    """A tensor on the second device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        away = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=AWAY,
        )
        away.held = held
        return away

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the second device, but not within TwoDevices")


class Crossing(NamedTuple):
    """A copy from one device to the other."""

    source: torch.device
    shape: tuple[int, ...]


class TwoDevices(TorchDispatchMode):
    """Within, tensors on ``AWAY`` can be made and computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        away = [x for x in given if isinstance(x, Away)]
        here = [x for x in given if not isinstance(x, Away) and x.ndim]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if away and here and not copies:
            shapes = [tuple(x.shape) for x in away], [tuple(x.shape) for x in here]
            raise RuntimeError(f"{func} mixes devices: {shapes[0]} away, {shapes[1]} on the CPU")
        target = kwargs.get("device") or (given[0].device if given else CPU)
        if copies and given[-1].device != target:
            self.crossings.append(Crossing(given[-1].device, tuple(given[-1].shape)))
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        own = {id(x.held): x for x in away}
        args, kwargs = tree_map_only(Away, lambda x: x.held, (args, kwargs))
        out = func(*args, **kwargs)
        if target == CPU:
            return out
        return tree_map_only(Tensor, lambda x: own[id(x)] if id(x) in own else Away(x), out)


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    """``TwoDevices``, and autocast, which knows no meta device, off."""
    real = torch.autocast

    def autocast(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == AWAY.type else real(device_type, **options)

    with pytest.MonkeyPatch.context() as patch, TwoDevices() as devices:
        patch.setattr(torch, "autocast", autocast)
        yield devices


def send_away(model: nn.Module) -> None:
    """Move a model's weights to the second device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Away(parameter.detach().clone()))
