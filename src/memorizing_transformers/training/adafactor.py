"""Adafactor whose scalars stay on the device, so that no step waits for a GPU.

torch's asks for two norms of every parameter (``item``), and the Adafactor of transformers for
one; with its ``foreach`` torch's asks just the same. State and settings are those of torch's, so
checkpoints fit both.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _mean_square(x: Tensor, dim: int) -> Tensor:
    """The mean of squares over a dimension, which stays with size 1."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm.square() / x.shape[dim]


def _root_mean_square(x: Tensor) -> Tensor:
    """The root of the mean of all squares, a scalar in fp32."""
    return torch.linalg.vector_norm(x, dtype=torch.float32) / x.numel() ** 0.5


class Adafactor(torch.optim.Adafactor):
    """``torch.optim.Adafactor``, equal to rounding; ``foreach`` is not used.

    Its arguments are those of torch's. A group may have ``lr_factor``: its ``lr`` is so many times
    that of the others, and so is the bound 1 / sqrt(step) on it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimiser step.

        Args:
            closure: computes the loss and the gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad: Tensor = parameter.grad  # type: ignore[assignment]
        if group["maximize"]:
            grad = -grad
        state, factored = self.state[parameter], grad.ndim > 1
        if not state:
            # On the CPU, so that the host knows it.
            state["step"] = torch.tensor(0.0, device="cpu")
            if factored:
                state["row_var"] = torch.zeros_like(grad[..., :1])
                state["col_var"] = torch.zeros_like(grad[..., :1, :])
            else:
                state["variance"] = torch.zeros_like(grad)
        state["step"] += 1
        step, (least, least_size) = state["step"].item(), group["eps"]
        least = torch.finfo(parameter.dtype).eps if least is None else least
        newest = step ** group["beta2_decay"]
        rate = min(group["lr"], group.get("lr_factor", 1.0) * step**-0.5)
        size = _root_mean_square(parameter).clamp(min=least_size) * rate

        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if factored:
            rows, columns = state["row_var"], state["col_var"]
            rows.lerp_(_mean_square(grad, -1), newest)
            columns.lerp_(_mean_square(grad, -2), newest)
            variance = rows @ columns
            variance = variance.div_(rows.mean(dim=-2, keepdim=True).clamp(min=least))
        else:
            variance = state["variance"].lerp_(grad.square(), newest).clone()
        update = variance.clamp_(min=least**2).rsqrt_().mul_(grad)
        update.mul_(size / (_root_mean_square(update) / group["d"]).clamp(min=1.0))
        parameter.sub_(update)
