"""The output head of a pretrained model: losses from hidden states, without logits of all tokens.

A family may scale its logits or bound them. A few tokens tell whether all of that is known: if
their losses are not those of the model's own logits, these are computed for all tokens.

Shapes: B rows, N segment, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..memory import SegmentPairs
from ..model import MemorizingNet, ModelOutput
from ..model.forecast import Forecast, forecast


class OutputHead:
    """What lies between a base's last hidden states and its logits, beside a linear map.

    Args:
        base: a decoder with a language-modelling head, without hooks.
        vocabulary: ids that it knows.
        count: tokens that it is tried on.
    """

    def __init__(self, base: Any, vocabulary: int, count: int) -> None:
        kind = base.config.get_text_config()
        self.cap: float | None = getattr(kind, "final_logit_softcapping", None)
        """Bound of Gemma's logits."""
        times, over = (getattr(kind, name, None) for name in ("logit_scale", "logits_scaling"))
        self.scale = (times or 1.0) / (over or 1.0)
        """Factor of Cohere's and of Granite's logits."""
        self.known = _can_be_read(base) and self._agrees(base, vocabulary, count)
        """Whether losses follow from hidden states."""

    def __call__(
        self, base: Any, input_ids: Tensor, targets: Tensor | None = None, **options: Any
    ) -> ModelOutput:
        """Logits, or the losses of targets; no pairs yet.

        Args:
            base: the model.
            input_ids: (B, N) int64.
            targets: (B, N) int64, -100 for tokens that do not count; None for logits.
            options: of the model.
        """
        if targets is not None and self.known and _can_be_read(base):
            own = self._forecast(base, input_ids, targets, **options)
            hits = own.best == targets
            return ModelOutput(None, SegmentPairs({}, {}), nll=own.nll, hits=hits)
        logits = base(input_ids, **options).logits
        if targets is None:
            return ModelOutput(logits, SegmentPairs({}, {}))
        nll, hits = MemorizingNet.loss(logits, targets, "none"), logits.argmax(-1) == targets
        return ModelOutput(None, SegmentPairs({}, {}), nll=nll, hits=hits)

    def _forecast(self, base: Any, input_ids: Tensor, targets: Tensor, **options: Any) -> Forecast:
        hidden = base.get_decoder()(input_ids, **options).last_hidden_state
        linear = base.get_output_embeddings()
        bias = None if linear.bias is None else linear.bias * self.scale
        return forecast(hidden * self.scale, linear.weight, targets, bias=bias, cap=self.cap)

    @torch.no_grad()
    def _agrees(self, base: Any, vocabulary: int, count: int) -> bool:
        """Whether the likeliest and the unlikeliest tokens have the losses of the base's logits."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, count), generator=generator, device="cpu").to(
            base.device
        )
        was = {module: module.training for module in base.modules()}
        base.eval()
        logits = base(ids, use_cache=False).logits
        agree = True
        for targets in (logits.argmax(-1), logits.argmin(-1)):
            expected = MemorizingNet.loss(logits, targets, "none")
            found = self._forecast(base, ids, targets, use_cache=False).nll
            # Logits in half precision have two to three digits; a GPU may multiply in TF32.
            rounding = 0.005 if logits.dtype == torch.float32 else 0.03
            agree &= bool((found - expected).abs().max() <= rounding * logits.abs().max())
        for module, mode in was.items():
            module.training = mode
        return agree


def _can_be_read(base: Any) -> bool:
    """Whether the head is a plain linear map, not one that an adapter or a quantiser replaced."""
    if not isinstance(base, PreTrainedModel):
        return False
    linear = base.get_output_embeddings()
    return type(linear) is nn.Linear and linear.weight.is_floating_point()
