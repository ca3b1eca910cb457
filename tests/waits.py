"""Counts where a host would wait for its GPU, on a machine that has none.

To be used within ``two_devices("cuda")``. A wait is what would have the host ask the second device
for numbers, or copy to it from memory that is not pinned.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from two_devices import AWAY, COPIES, Away, aten

import memorizing_transformers

OURS = str(Path(memorizing_transformers.__file__).parents[1])
BENEATH = ("torch/_", "torch/utils/")
"""Files of torch's that every operation passes through."""
ASKING = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.unique_consecutive.default: "unique_consecutive",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations whose outcome, or the shape of it, is for the host to know."""
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Wait(NamedTuple):
    """One time that the host waits."""

    step: int
    what: str
    where: str
    """File and line."""


class Waits(TorchDispatchMode):
    """Within, every wait is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        """What is noted with a wait; for the caller to count."""
        self.seen: list[Wait] = []

    def __enter__(self) -> Waits:
        Away.watching.append(self._note)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        Away.watching.remove(self._note)
        super().__exit__(*error)

    def _note(self, what: str) -> None:
        self.seen.append(Wait(self.step, what, _place(sys._getframe())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        what = self._reason(func, args, kwargs or {})
        if what is not None:
            self._note(what)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _reason(func: Any, args: Any, kwargs: Any) -> str | None:
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        away = any(isinstance(x, Away) for x in given)
        if func in COPIES and given:
            target = torch.device(kwargs.get("device") or given[0].device)
            source = given[-1].device
            waits = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
            if source == AWAY != target:
                return "copy to the host"
            if target == AWAY != source and waits:
                return "copy from the host"
        if not away:
            return None
        if func in INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            # One number where a mask is True needs no list of places.
            alone = func is not aten.index.Tensor and args[2].ndim == 0
            return "index by a mask" if masks and not alone else None
        return ASKING.get(func)


def _place(frame: FrameType | None) -> str:
    """The line that asks; of a library's also the line of ours that called it."""
    library = ""
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if name.startswith(OURS):
            own = f"{Path(name).relative_to(OURS)}:{line}"
            return f"{library}, from {own}" if library else own
        part = name.rpartition("/site-packages/")[2]
        if not library and part != name and not part.startswith(BENEATH):
            library = f"{part}:{line}"
        frame = frame.f_back
    return library
