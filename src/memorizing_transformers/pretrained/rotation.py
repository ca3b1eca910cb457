"""Rotary positions of a pretrained model: keys are turned back to position 0, and to any other.

Shapes: B rows, H heads, N tokens, D head width, d rotated width.

A family's own function does the turning, so its layout (halves, interleaved, partial) is not
repeated here: with ``-sin`` it turns back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""Cosines and sines as the family computes them."""


class RotaryCalls:
    """Remembers how a model asked its rotary modules, to ask them for other positions.

    Args:
        model: the pretrained model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] | None = None
        """Those of the forward pass that reads a bank; None for others."""
        for module in model.modules():
            if "RotaryEmbedding" in type(module).__name__:
                module.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.calls is not None:
            self.calls.append((module, args, kwargs, output))

    def asked(self, angles: Angles) -> Callable[[Tensor], Angles]:
        """The function of positions (B, N) that gave these angles.

        Raises:
            LookupError: where no rotary module gave them.
        """
        for module, args, kwargs, output in self.calls or []:
            if output[0] is angles[0]:
                return partial(_ask_again, module, args, kwargs)
        raise LookupError("no rotary module gave these angles")


def _ask_again(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], positions: Tensor
) -> Angles:
    given, named = list(args), dict(kwargs)
    if "position_ids" in named:
        named["position_ids"] = positions
    else:
        given[1] = positions
    # A call of the module itself would be noted too.
    angles: Angles = type(module).forward(module, *given, **named)
    return angles


HALF_ANGLES = {"gpt_oss"}
"""Families whose angles are given once for both halves of a head, so half as wide as the head."""


class Rotation:
    """Turns the keys of one layer in this forward pass.

    Args:
        attention: the layer's attention module.
        angles: cosines and sines of the segment, (B, N, d) each.
        ask: the same at other positions.
    """

    def __init__(
        self, attention: nn.Module, angles: Angles, ask: Callable[[Tensor], Angles]
    ) -> None:
        self.apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.angles = angles
        self.ask = ask
        kind: Any = attention.config
        self.repeats = 2 if kind.model_type in HALF_ANGLES else 1

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        # Some families split off what is not rotated before they call their function.
        width = self.repeats * cos.shape[-1]
        part = x[..., :width]
        turned = self.apply(part, part, cos, sin)[1] / factor
        return torch.cat([turned, x[..., width:]], dim=-1)

    def back(self, keys: Tensor) -> Tensor:
        """The segment's rotated keys (B, G, N, D) at position 0."""
        cos, sin = self.angles
        # YaRN multiplies both by one factor.
        factor = (cos.float().square() + sin.float().square()).mean()
        return self._turn(keys, cos, -sin, factor)

    def to(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, G, N, D) from position 0 to ``positions`` (B, N)."""
        # A memory may lie on another device than the model.
        cos, sin = self.ask(positions.to(self.angles[0].device))
        return self._turn(keys, cos.to(keys.device), sin.to(keys.device))
