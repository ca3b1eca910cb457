"""Compiling a model: a segment's forward pass as one graph, or its dense parts one by one.

One graph is compiled where all that is read can be lent to it (``memory/lent.py``); else, as in
generation or where weights are sharded, the dense parts alone, which read no memory. Compiled are
methods and not modules, so the names of weights stay as they are, and a copy of a module works on
its own weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache, wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

_wholes: WeakKeyDictionary[nn.Module, dict[Hashable, Callable[..., Any]]] = WeakKeyDictionary()
"""By module and by what a call is like, what runs."""


def _compile(method: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # Variants count against a limit of torch's; so each call of this has its own.
    make: Any = torch.compile  # its stubs do not know the option
    compiled: Callable[..., Any] = make(method, isolate_recompiles=True, **options)
    return compiled


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@cache
def _compiled(
    method: Callable[..., Any], kind: type, mode: tuple[bool, bool]
) -> Callable[..., Any]:
    # A module's class and the mode of gradients have variants of their own. A second shape makes
    # what differs a variable of the code.
    return _compile(method)


def compilable(method: Method) -> Method:
    """A module's method, compiled where the module's ``compile_dense`` is True."""

    @wraps(method)
    def run(self: Any, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not self.compile_dense:
            return method(self, *arguments)
        kind: Any = type(self)
        return _compiled(method, kind, _mode())(self, *arguments)

    return run  # type: ignore[return-value]


def run_whole(
    method: Callable[..., Any], module: nn.Module, like: Hashable, *arguments: Any
) -> Any:
    """Call a module's method as one compiled graph.

    Where the compiler fails, or has made as many variants as torch allows, the log says so once,
    and from then on such calls run the method as it is.

    Args:
        method: takes the module and ``arguments``.
        module: whose weights it uses.
        like: what calls that share variants have in common, apart from the mode of gradients.
    """
    ways = _wholes.setdefault(module, {})
    key = (method, _mode(), module.training, like)
    if key not in ways:
        ways[key] = _compile(method, fullgraph=True)
    try:
        return ways[key](module, *arguments)
    except Exception as error:
        if ways[key] is method or not type(error).__module__.startswith("torch."):
            raise
        first = str(error).strip().splitlines()[0]
        logger.warning("the model is not compiled as one graph but in parts: %s", first)
        ways[key] = method
    return method(module, *arguments)
