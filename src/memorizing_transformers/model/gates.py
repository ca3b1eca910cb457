"""Gates: how a memory layer joins what it retrieved with local attention.

A gate is one class and one entry of ``GATES``. It gives the memory's share of each head's output:
``output = share * memory + (1 - share) * local``.

Shapes: B rows, H query heads, N segment.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import MemoryConfig


class Evidence(NamedTuple):
    """What a layer knows of its attention when the gate decides; (B, H, N) each."""

    memory_mass: Tensor
    """Log of the summed exponentials of the retrieved pairs' scores."""
    local_mass: Tensor | None
    """The same of the local scores; None unless the gate needs it."""
    best: Tensor | None
    """Largest score of a retrieved pair; None unless the gate needs it."""
    match: Tensor | None
    """Mean match length of the retrieved pairs by their weights; None unless it was counted."""


class Gate(nn.Module):
    """The memory's share of a layer's output.

    Args:
        num_heads: query heads H.
        d_model: width of the hidden states.
        config: the memory's settings.
    """

    needs_local_mass: ClassVar[bool] = False
    """Whether ``share`` reads the log mass of local attention, which costs a slower kernel."""
    needs_scores: ClassVar[bool] = False
    """Whether ``share`` reads the best score and the match length."""
    depends_on_token: ClassVar[bool] = False
    """Whether tokens of one head differ in their share."""

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__()

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """The memory's share in [0, 1], broadcastable to (B, H, N), in fp32.

        Rows whose memory is empty get a share of 0 afterwards, whatever is returned here.

        Args:
            hidden: (B, N, d_model) what the layer's attention reads.
            evidence: what was found.
        """
        raise NotImplementedError

    def learned(self) -> Tensor | None:
        """(H,) the share of each head, where it is one learned number; else None."""
        return None


class HeadGate(Gate):
    """A learned number per head: ``share = sigmoid(logit)``. Wu et al., 2022, section 3.2."""

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__(num_heads, d_model, config)
        self.logit = nn.Parameter(torch.full((num_heads,), _logit(config.gate_init)))

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(H, 1)."""
        return torch.sigmoid(self.logit.float())[:, None]

    def learned(self) -> Tensor | None:
        """(H,) shares; sharded where the weights are."""
        return torch.sigmoid(self.logit.detach().float())


class FixedGate(Gate):
    """The same share for all heads and tokens, ``fixed_value``; nothing is learned."""

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__(num_heads, d_model, config)
        self.value = config.fixed_value

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(B, H, N)."""
        return torch.full_like(evidence.memory_mass, self.value)


class ContentGate(Gate):
    """A share per head and token: ``share = sigmoid(W hidden + b)``."""

    depends_on_token = True

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__(num_heads, d_model, config)
        self.linear = nn.Linear(d_model, num_heads)
        nn.init.constant_(self.linear.bias, _logit(config.gate_init))

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(B, H, N)."""
        return torch.sigmoid(self.linear(hidden).float()).transpose(1, 2)


class JointGate(Gate):
    """One softmax over retrieved and local keys; nothing is learned.

    It weighs each set's own softmax by its part of the summed exponentials:
    ``share = sigmoid(memory_mass - local_mass)``.
    """

    needs_local_mass = True
    depends_on_token = True

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(B, H, N)."""
        assert evidence.local_mass is not None
        return torch.sigmoid(evidence.memory_mass - evidence.local_mass)


class JointBiasGate(JointGate):
    """One softmax over retrieved and local keys, with a learned bias per head on the retrieved.

    ``share = sigmoid(b + memory_mass - local_mass)``. b starts at 0, where this is ``JointGate``.
    """

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__(num_heads, d_model, config)
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(B, H, N)."""
        assert evidence.local_mass is not None
        bias = self.bias.float()[:, None]
        return torch.sigmoid(bias + evidence.memory_mass - evidence.local_mass)


class EvidenceGate(Gate):
    """A share per head and token, from the hidden state and from what was found.

    ``share = sigmoid(b + a memory_mass - c local_mass + w hidden + e best + f match)``. It starts
    as the paper's gate: all but b are 0. With a = c = 1 it is one softmax over retrieved and local
    keys with an offset b; with a = 1 a null key of score -b in the memory's softmax (a sink logit);
    with w a content gate.
    """

    needs_local_mass = True
    needs_scores = True
    depends_on_token = True

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__(num_heads, d_model, config)
        self.bias = nn.Parameter(torch.full((num_heads,), _logit(config.gate_init)))
        self.evidence = nn.Parameter(torch.zeros(4, num_heads))
        self.hidden = nn.Parameter(torch.zeros(num_heads, d_model))

    def share(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """(B, H, N)."""
        assert evidence.local_mass is not None
        assert evidence.best is not None
        match = evidence.match
        known = [
            evidence.memory_mass,
            -evidence.local_mass,
            evidence.best,
            torch.zeros_like(evidence.best) if match is None else match,
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            logit = self.bias.float()[:, None] + (hidden.float() @ self.hidden.float().t()).mT
        for weight, x in zip(self.evidence.float(), known, strict=True):
            logit = logit + weight[:, None] * x
        return torch.sigmoid(logit)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


GATES: dict[str, type[Gate]] = {
    "gate": HeadGate,
    "fixed": FixedGate,
    "content": ContentGate,
    "joint": JointGate,
    "joint-bias": JointBiasGate,
    "evidence": EvidenceGate,
}
"""By their name in ``model.memory.combine``."""
