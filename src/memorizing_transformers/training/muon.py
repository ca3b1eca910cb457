"""Muon for the matrices of the layers and AdamW for all other parameters, as one optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ..memory.search.policy import has_fast_bfloat16

IN_A_LAYER = re.compile(r"\.\d+\.")
"""Finds the number of a layer in the name of a parameter."""


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a linear map inside a layer.

    The embedding, the output layer, tables of position biases and what reads the memory are none.
    """
    other = bool({"table", "reader", "memory_reader", "copy_head"} & {*name.split(".")})
    inside = bool(IN_A_LAYER.search(name)) and name.endswith("weight")
    return inside and parameter.ndim == 2 and not other


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix with singular values near 1, in its own precision.

    Each step maps a singular value s to ``a s + b s^3 + c s^5`` (Keller Jordan, 2024, see
    :class:`MuonWithAdamW`), from ``s / max(eps, norm)`` on.

    Args:
        matrix: (rows, columns).
        coefficients: a, b and c.
        steps: how often.
        eps: a bound below for the norm.

    Returns:
        (rows, columns).
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    now = matrix.T if tall else matrix
    now = now / now.norm().clamp(min=eps)
    for _ in range(steps):
        gram = now @ now.T
        now = torch.addmm(now, torch.addmm(gram, gram, gram, beta=b, alpha=c), now, beta=a)
    return now.T if tall else now


class MuonInFp32(Muon):
    """torch's Muon, which always computes in bf16, for processors without instructions for it.

    There one step on a matrix of 128 x 512 takes 27 times as long in bf16 as in fp32 (one thread of
    an AMD EPYC with AVX2). Only the scale ``match_rms_adamw`` is known here.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on all parameters with a gradient; its state is that of torch's Muon."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalised(
                    update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-lr * scale)


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
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must lie in [0, 1)")
        if ns_steps < 1:
            raise ValueError(f"ns_steps = {ns_steps}: must be at least 1")
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
        self._muon_in_fp32 = MuonInFp32(matrices or nothing, lr=lr, adjust_lr_fn=scale, **muon)
        self._adamw = AdamW(others or nothing, lr=lr, betas=betas, eps=eps)
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both, on this optimiser's groups and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        on_cpu = all(p.device.type == "cpu" for g in self.param_groups for p in g["params"])
        muon = self._muon_in_fp32 if on_cpu and not has_fast_bfloat16() else self._muon
        for part, matrices in ((muon, True), (self._adamw, False)):
            part.param_groups = [g for g in self.param_groups if g["matrices"] is matrices]
            part.state = self.state
            part.step()
        return loss
