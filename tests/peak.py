"""The most bytes of tensors that live at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made within and still live, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(values: Any) -> list[Any]:
            return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]

        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in storages(made):
            if storage.data_ptr() in given or storage in self._seen:
                continue
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())
        return made

    def _free(self, count: int) -> None:
        self.live -= count
