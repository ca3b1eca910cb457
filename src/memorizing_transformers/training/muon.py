"""Muon for the matrices of the layers and AdamW for all other parameters, as one optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

IN_A_LAYER = re.compile(r"\.\d+\.")
"""Finds the number of a layer in the name of a parameter."""


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a linear map inside a layer.

    The embedding, the output layer, tables of position biases and what reads the memory are none.
    """
    other = bool({"table", "reader", "memory_reader", "copy_head"} & {*name.split(".")})
    inside = bool(IN_A_LAYER.search(name)) and name.endswith("weight")
    return inside and parameter.ndim == 2 and not other


class MuonWithAdamW(Optimizer):
    """Orthogonalised momentum for groups with ``matrices``, AdamW for the others.

    Keller Jordan, 2024, "Muon: an optimizer for hidden layers in neural networks". An update of
    Muon is scaled by ``0.2 * sqrt(max(rows, columns))``, as in Liu et al., 2025 (arXiv 2502.16982),
    so that one learning rate serves both.

    Args:
        params: groups; those with ``matrices: True`` hold parameters of two dimensions.
        lr: learning rate of groups without one of their own.
        betas: the two decay rates of AdamW.
        momentum: decay rate of Muon's momentum.
        nesterov: whether Muon looks ahead by one step of its momentum.
        ns_steps: iterations that orthogonalise an update.
        eps: AdamW's constant against division by zero.

    Raises:
        ValueError: where an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        for group in groups:
            group.setdefault("matrices", False)
        matrices = [group for group in groups if group["matrices"]]
        others = [group for group in groups if not group["matrices"]]
        muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        nothing: list[dict[str, Any]] = [{"params": []}]
        # Each completes its groups with its own defaults. An empty list would be refused.
        scale = "match_rms_adamw"
        self._muon = Muon(matrices or nothing, lr=lr, adjust_lr_fn=scale, **muon)
        self._adamw = AdamW(others or nothing, lr=lr, betas=betas, eps=eps)
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both, on this optimiser's groups and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, matrices in ((self._muon, True), (self._adamw, False)):
            part.param_groups = [g for g in self.param_groups if g["matrices"] is matrices]
            part.state = self.state
            part.step()
        return loss
