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
from inspect import signature
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

_Way = tuple[torch.Size | None, Callable[..., Any]]
_wholes: WeakKeyDictionary[nn.Module, dict[Hashable, _Way]] = WeakKeyDictionary()
"""By module and kind of call: the shape that it is for, None for all others, and what runs."""


def compile_apart(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function; its variants count against a limit of torch's.

    Each call of this has its own count, except in versions of torch that lack the option (2.11
    does): there all that is made of one function has one count.
    """
    make: Any = torch.compile  # its stubs do not know the option
    if "isolate_recompiles" in signature(make).parameters:
        options["isolate_recompiles"] = True
    compiled: Callable[..., Any] = make(function, **options)
    return compiled


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@cache
def _compiled(
    method: Callable[..., Any], kind: type, mode: tuple[bool, bool]
) -> Callable[..., Any]:
    # A module's class and the mode of gradients have variants of their own. A second shape makes
    # what differs a variable of the code.
    return compile_apart(method)


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
    method: Callable[..., Any], module: nn.Module, like: Hashable, ids: Tensor, *arguments: Any
) -> Any:
    """Call a module's method as one compiled graph.

    The first shape of each kind of call has code of its own, whatever other kinds came before; so
    a run that resumes compiles the same code. All other shapes share variants. Where the compiler
    fails, or has made as many variants as torch allows, the log says so once, and from then on such
    calls run the method as it is.

    Args:
        method: takes the module, ``ids`` and ``arguments``.
        module: whose weights it uses.
        like: what calls of one kind have in common, apart from the mode of gradients.
        ids: (B, N), whose shape decides all others.
        arguments: the others.
    """
    ways = _wholes.setdefault(module, {})
    kind: Hashable = (method, *_mode(), module.training, like)
    if kind not in ways:
        ways[kind] = (ids.shape, compile_apart(method, fullgraph=True, dynamic=False))
    if ids.shape != ways[kind][0]:
        kind = (kind, "other shapes")
        if kind not in ways:
            ways[kind] = (None, compile_apart(method, fullgraph=True))
    shape, run = ways[kind]
    try:
        return run(module, ids, *arguments)
    except Exception as error:
        if run is method or not type(error).__module__.startswith("torch."):
            raise
        said = str(error).strip().splitlines()[0]
        logger.warning("the model is not compiled as one graph but in parts: %s", said)
        ways[kind] = (shape, method)
    return method(module, ids, *arguments)
