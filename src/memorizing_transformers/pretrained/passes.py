"""Which segment the hooks read: that of the forward pass they are in, also when a layer of it is
computed again.

Under activation checkpointing a backward pass computes layers of a forward pass that is long over.
So what such a layer is computed by carries the segment of its own pass, and between passes the
hooks hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .hook import LayerHook
from .rotation import RotaryCalls
from .segment import Segment


class Passes:
    """The forward passes of a base that read a bank.

    Args:
        base: the model.
        hooks: by layer.
        calls: what the base asks its rotary modules.
    """

    def __init__(self, base: nn.Module, hooks: Mapping[int, LayerHook], calls: RotaryCalls) -> None:
        self.base, self.hooks, self.calls = base, hooks, calls

    @contextmanager
    def reading(self, segment: Segment, layers: Collection[int]) -> Iterator[None]:
        """Let the hooks of some layers read a segment, now and when a layer is computed again.

        Args:
            segment: of this pass.
            layers: whose hooks read.
        """
        calls: list[Any] = []
        with ExitStack() as stack:
            # Without gradients nothing is computed again, and generation need not look for it.
            for module in self.base.modules() if torch.is_grad_enabled() else ():
                # What computes a layer again: transformers' own, and torch's wrapper.
                found = {
                    "_gradient_checkpointing_func": getattr(
                        module, "_gradient_checkpointing_func", None
                    ),
                    "checkpoint_fn": getattr(module, "checkpoint_fn", None),
                }
                for name, function in found.items():
                    if function is not None:
                        setattr(module, name, self._bound(function, segment, layers, calls))
                        stack.callback(setattr, module, name, function)
            stack.enter_context(self._held(segment, layers, calls))
            yield

    def _bound(self, checkpoint: Callable[..., Any], *pass_: Any) -> Callable[..., Any]:
        """A checkpointing function whose layers read in their own pass whenever they run."""

        def bound(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*given: Any, **named: Any) -> Any:
                with self._held(*pass_):
                    return layer(*given, **named)

            return checkpoint(again, *args, **kwargs)

        return bound

    @contextmanager
    def _held(self, segment: Segment, layers: Collection[int], calls: list[Any]) -> Iterator[None]:
        before = [(hook, hook.segment) for hook in self.hooks.values()]
        asked = self.calls.calls
        self.calls.calls = calls
        for layer in layers:
            self.hooks[layer].segment = segment
        try:
            yield
        finally:
            self.calls.calls = asked
            for hook, was in before:
                hook.segment, hook.hidden = was, None
