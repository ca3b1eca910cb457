"""A second device on a machine that has one: tensors of real numbers that say they are elsewhere.

Within ``TwoDevices`` tensors on ``AWAY`` compute as those on the CPU do, and an operation that
mixes the two raises, as it would with a GPU; so does one that draws from the other device's
generator, and one in a dtype that the device lacks. Torch's own fake tensors cannot serve here:
autograd refuses them on a build without CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from memorizing_transformers.data import batch

AWAY = torch.device("meta")
"""What a tensor on the second device says; of all devices' autograd runs this one's on the CPU."""
CPU = torch.device("cpu")
LACKING = {"cuda": (), "mps": (torch.float64, torch.complex128), "xpu": ()}
"""By kind of device, the dtypes that it does not know."""
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
LONE_NUMBERS = (
    aten.masked_fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.fill_.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._local_scalar_dense.default,
)
"""What takes a lone number from the CPU though it does not combine numbers one by one."""


class Away(Tensor):
    """A tensor on the second device; ``held`` has its numbers."""

    held: Tensor
    is_cuda = property(lambda _: TwoDevices.kind == "cuda")  # type: ignore[assignment]

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

    watching: ClassVar[list[Callable[[str], None]]] = []
    """Told of what asks for numbers without a dispatch."""

    def tolist(self) -> Any:
        for watch in Away.watching:
            watch("tolist")
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
    """Within, tensors on ``AWAY`` can be made and computed with.

    Args:
        kind: what the second device is like: cuda, with kernels of its own in torch; mps, which
            knows no fp64; or xpu, neither.
    """

    kind = "xpu"

    def __init__(self, kind: str = "xpu") -> None:
        super().__init__()
        TwoDevices.kind = kind
        self.crossings: list[Crossing] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        away = [x for x in given if isinstance(x, Away)]
        # Only where numbers are combined one by one may a lone one come from the CPU.
        alone = torch.Tag.pointwise in func.tags or func in LONE_NUMBERS
        here = [x for x in given if not isinstance(x, Away) and (x.ndim or not alone)]
        if away and here and func not in COPIES:
            shapes = [tuple(x.shape) for x in away], [tuple(x.shape) for x in here]
            raise RuntimeError(f"{func} mixes devices: {shapes[0]} away, {shapes[1]} on the CPU")
        target = torch.device(kwargs.get("device") or (given[0].device if given else CPU))
        generators = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Generator)]
        if any(generator.device != target for generator in generators):
            raise RuntimeError(f"{func} on {target} draws from a generator on another device")
        if func in COPIES and given[-1].device != target:
            self.crossings.append(Crossing(given[-1].device, tuple(given[-1].shape)))
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        own = {id(x.held): x for x in away}
        args, kwargs = tree_map_only(Away, lambda x: x.held, (args, kwargs))
        out = func(*args, **kwargs)
        if target == CPU:
            return out
        return tree_map_only(Tensor, lambda x: own[id(x)] if id(x) in own else self._away(x), out)

    def _away(self, x: Tensor) -> Away:
        if x.dtype in LACKING[self.kind]:
            raise TypeError(f"the second device, a {self.kind}, knows no {x.dtype}")
        return Away(x)


class _FromData(TorchFunctionMode):
    """Tensors made of Python's numbers, which torch makes below every dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs, device=CPU).to(device)
        return func(*args, **kwargs)


@contextmanager
def two_devices(kind: str = "xpu") -> Iterator[TwoDevices]:
    """``TwoDevices``, and autocast, which knows no meta device, off."""
    real = torch.autocast

    def autocast(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == AWAY.type else real(device_type, **options)

    with pytest.MonkeyPatch.context() as patch, _FromData(), TwoDevices(kind) as devices:
        patch.setattr(torch, "autocast", autocast)
        if kind == "mps":
            patch.setattr(batch, "WITHOUT_FP64", {AWAY.type})
        yield devices


def send_away(model: nn.Module) -> None:
    """Move a model's weights to the second device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Away(parameter.detach().clone()))
