"""Compiling the dense parts of a model: what reads no memory.

A memory fills, and what is found in it changes from step to step: search, attention over what was
found, and commit stay as they are. Compiled are methods and not modules, so the names of weights
stay as they are too, and a copy of a module works on its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


@cache
def _compiled(
    method: Callable[..., Any], kind: type, mode: tuple[bool, bool]
) -> Callable[..., Any]:
    # Variants count against a limit, beyond which torch runs eagerly: a module's class and the mode
    # of gradients each have their own. A second shape makes what differs a variable of the code.
    make: Any = torch.compile  # its stubs do not know the option
    compiled: Callable[..., Any] = make(method, isolate_recompiles=True)
    return compiled


def compilable(method: Method) -> Method:
    """A module's method, compiled where the module's ``compile_dense`` is True."""

    @wraps(method)
    def run(self: Any, *arguments: Any) -> Any:
        if not self.compile_dense:
            return method(self, *arguments)
        kind: Any = type(self)
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return _compiled(method, kind, mode)(self, *arguments)

    return run  # type: ignore[return-value]
