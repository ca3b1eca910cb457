"""The copy head: mixes tokens of the memory into the prediction.

A source of copies gives candidates, each a token and its odds against the model's own prediction
``p_LM``: ``p(w) = (p_LM(w) + sum_j odds_j [token_j = w]) / (1 + sum_j odds_j)``. A continuous
cache (Grave et al., 2017) whose weights are learned, as those of pointer sentinel mixtures (Merity
et al., 2017) and of TRIME (Zhong et al., 2022).

Shapes: B rows, N segment, H query heads, C candidates, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import Readable, RepeatSearch
from .config import MemoryConfig
from .copying import COPIES, Candidates, CopyInputs, OwnForecast, sum_by_token
from .forecast import IGNORE_INDEX, Forecast
from .reader import Retrieval

CHUNK = 64
"""Tokens of a segment whose logits are held in fp32 at once."""


class Found(NamedTuple):
    """The candidates of all sources for one segment."""

    inputs: CopyInputs
    candidates: list[Candidates]
    """By source."""
    tokens: Tensor
    """(B, N, C) int64 those of all."""


class CopyHead(nn.Module):
    """The mixture with all sources, as logits or as losses of targets: it sums to 1.

    Where a row's memory is empty, nothing is changed.

    Args:
        num_heads: query heads H of the memory layer.
        d_model: width of the hidden states.
        config: the memory's settings; ``copy`` names the sources, of ``COPIES``.
    """

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__()
        self.sources = nn.ModuleDict(
            {name: COPIES[name](num_heads, d_model, config) for name in config.copy}
        )

    @property
    def repeats(self) -> RepeatSearch | None:
        """What finds earlier occurrences of the text, if a source copies what followed them."""
        searches = (getattr(source, "search", None) for source in self.sources.values())
        return next((search for search in searches if search is not None), None)

    def find(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        memory: Readable,
        retrieval: Retrieval,
        vocab_size: int,
    ) -> Found:
        """The candidates.

        Args:
            hidden: (B, N, d_model) normalised hidden states, of unit root mean square.
            input_ids: (B, n + N) of the segment, up to these N tokens.
            memory: the last memory layer's, of these B rows.
            retrieval: what that layer retrieved, live.
            vocab_size: tokens V that there are.
        """
        inputs = CopyInputs(hidden.float(), input_ids, memory, retrieval, vocab_size)
        candidates = [source.candidates(inputs) for source in self._all()]
        return Found(inputs, candidates, torch.cat([x.tokens for x in candidates], -1))

    def mix(self, logits: Tensor, found: Found) -> tuple[Tensor, Tensor]:
        """Logits (B, N, V) of the mixture, and the weight (B, N) of the copies in it, detached.

        Args:
            logits: (B, N, V) of the model; they are overwritten.
            found: the candidates.
        """
        with torch.autocast(logits.device.type, enabled=False):
            raw = logits.detach()
            total = log_total(raw)
            log_p = raw.gather(-1, found.tokens).to(total) - total[..., None]
            odds = self._odds(found, OwnForecast(log_p, raw.amax(-1).to(total) - total))
            odds, once = sum_by_token(found.tokens, odds, logits.shape[-1])
            log_odds = _log(odds).masked_fill(~once, -torch.inf)
        mix = _mixed_in if torch.compiler.is_compiling() else _MixIn.apply
        mixed: Tensor = mix(logits, found.tokens, log_odds, total)
        return mixed, _weight(odds * once)

    def score(self, own: Forecast, targets: Tensor, found: Found) -> tuple[Tensor, Tensor, Tensor]:
        """Of the mixture the losses (B, N), the likeliest tokens (B, N) and the copies' weight.

        Args:
            own: what the model by itself says of targets and candidates.
            targets: (B, N) int64, -100 for tokens that do not count.
            found: the candidates.
        """
        assert own.log_p is not None
        with torch.autocast(targets.device.type, enabled=False):
            odds = self._odds(found, OwnForecast(own.log_p, own.best_log_p))
            same = found.tokens == targets[..., None]
            of_target = _log(odds.masked_fill(~same, 0.0).sum(-1))
            gained = F.softplus(of_target + own.nll)
            nll = own.nll + odds.sum(-1).log1p() - gained
            nll = nll.masked_fill(targets == IGNORE_INDEX, 0.0)
            odds = odds.detach()
            sums, _ = sum_by_token(found.tokens, odds, found.inputs.vocab_size)
            copied, place = (own.log_p.exp() + sums).max(-1)
            best = found.tokens.gather(-1, place[..., None])[..., 0]
            best = torch.where(copied >= own.best_log_p.exp(), best, own.best)
        return nll, best, _weight(odds)

    def _odds(self, found: Found, own: OwnForecast) -> Tensor:
        """(B, N, C) fp32 of all sources; 0 where the row's memory is empty."""
        own = OwnForecast(own.log_p.float(), own.best_log_p.float())
        parts, start = [], 0
        for source, candidates in zip(self._all(), found.candidates, strict=True):
            part = slice(start, start + candidates.tokens.shape[-1])
            log_p = own.log_p[..., part]
            parts.append(source.odds(found.inputs, candidates, own._replace(log_p=log_p)))
            start = part.stop
        odds = torch.cat(parts, -1)
        read = found.inputs.found.read.any(1)[..., None].to(odds.device)
        return odds.masked_fill(~read, 0.0)

    def _all(self) -> list[Any]:
        return [*self.sources.values()]


def _log(odds: Tensor) -> Tensor:
    """Their logarithm; minus infinity without a gradient where they are 0."""
    known = odds > 0
    return odds.masked_fill(~known, 1.0).log().masked_fill(~known, -torch.inf)


def _weight(odds: Tensor) -> Tensor:
    """The weight of the copies in the mixture (B, N), detached."""
    total = odds.detach().sum(-1)
    return total / (1 + total)


def log_total(logits: Tensor) -> Tensor:
    """Log of the summed exponentials (B, N) of logits (B, N, V), at least in fp32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = logits.split(CHUNK, dim=1)
    return torch.cat([part.to(wide).logsumexp(-1) for part in parts], 1)


def _mixed_in(logits: Tensor, tokens: Tensor, log_odds: Tensor, total: Tensor) -> Tensor:
    """What ``_MixIn`` gives, for a graph: nothing in place, and autograd's own backward pass."""
    if torch.is_grad_enabled():
        total = logits.to(total).logsumexp(-1)
    above = log_odds + total[..., None] - logits.gather(-1, tokens).to(log_odds)
    return logits.scatter_add(-1, tokens, F.softplus(above).to(logits.dtype))


class _MixIn(torch.autograd.Function):
    """Adds ``log(1 + odds / p(token))`` to the logits of tokens, in place.

    The softmax of the result is the mixture, so no second (B, N, V) is needed; the backward pass
    needs one for its gradient alone.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, log_odds: Tensor, total: Tensor
    ) -> Tensor:
        above = log_odds + total[..., None] - logits.gather(-1, tokens).to(log_odds)
        logits.scatter_add_(-1, tokens, F.softplus(above).to(logits.dtype))
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits, tokens, above, total)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        logits, tokens, above, total = ctx.saved_tensors
        (grad,) = grads
        change = grad.gather(-1, tokens).to(above) * above.sigmoid()
        result = grad.clone()
        sums = change.sum(-1, keepdim=True)
        for start in range(0, logits.shape[1], CHUNK):
            part = (slice(None), slice(start, start + CHUNK))
            # The softmax of the logits as they were before.
            before = logits[part].to(above) - total[part][..., None]
            # Taken off the logarithm: off the probability, little would be left of its digits.
            before.scatter_add_(-1, tokens[part], -F.softplus(above[part]))
            result[part] += before.exp_().mul_(sums[part])
        result.scatter_add_(-1, tokens, -change.to(result.dtype))
        return result, None, change, None
