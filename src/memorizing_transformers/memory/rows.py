"""What stores of several rows share: rows can be taken from them.

Shapes: B rows.
"""

from __future__ import annotations

from copy import copy
from typing import TypeVar

from torch import Tensor

Own = TypeVar("Own", bound="RowStore")


class RowStore:
    """A store whose tensors all begin with its rows."""

    def take(self: Own, rows: Tensor) -> Own:
        """A store of its own whose row ``i`` holds what row ``rows[i]`` of this one holds.

        Args:
            rows: (B',) int64.
        """
        taken = copy(self)
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(taken, name, tensor[rows.to(tensor.device)])
        return taken
