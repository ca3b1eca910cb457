"""The copy head: mixes tokens of the memory into the prediction.

A source of copies gives candidates, each a token and its odds against the model's own prediction
``p_LM``: ``p(w) = (p_LM(w) + sum_j odds_j [token_j = w]) / (1 + sum_j odds_j)``. A continuous
cache (Grave et al., 2017) whose weights are learned, as those of pointer sentinel mixtures (Merity
et al., 2017) and of TRIME (Zhong et al., 2022).

Shapes: B rows, N segment, H query heads, K neighbours, C candidates, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import Readable, RepeatSearch
from .config import MemoryConfig
from .reader import Retrieval

CHUNK = 64
"""Tokens of a segment whose logits are held in fp32 at once."""

DENSE = 16
"""Tokens of the vocabulary for each candidate up to which a table of all is faster than sorting."""


class CopyInputs(NamedTuple):
    """What a source of copies may look at: all of it is known before the predicted token."""

    hidden: Tensor
    """(B, N, d_model) fp32 what the logits are computed from, of unit root mean square."""
    logits: Tensor
    """(B, N, V) of the model; detached."""
    log_total: Tensor
    """(B, N) fp32 log of their summed exponentials."""
    input_ids: Tensor
    """(B, n + N) of the segment, up to these N tokens."""
    memory: Readable
    """The last memory layer's, of these B rows."""
    found: Retrieval
    """What that layer retrieved; live."""

    def log_probability(self, tokens: Tensor) -> Tensor:
        """The model's own (B, N, C) of tokens (B, N, C), in fp32."""
        return self.logits.gather(-1, tokens).float() - self.log_total[..., None]


def _odds(weight: float) -> float:
    """Of a candidate's weight in the mixture, its odds against the model."""
    return weight / (1 - weight)


class NeighbourCopies(nn.Module):
    """The tokens of the best pairs that the memory layer's heads retrieved, and those after them.

    A head's candidates share its odds by its attention to them, so the loss also trains what its
    queries look for. Which of the two tokens a head's keys stand for is learned.

    Args:
        num_heads: query heads H of the memory layer.
        d_model: width of the hidden states.
        config: the memory's settings.
    """

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__()
        self.nearest = config.copy_top_k
        start = math.log(_odds(config.copy_init) / 2 / num_heads)
        self.log_odds = nn.Parameter(torch.full((2, num_heads), start))
        self.sharpness = nn.Parameter(torch.zeros(2, num_heads))
        """How much a head's largest attention weight adds to its log odds."""
        self.hidden = nn.Parameter(torch.zeros(2, d_model))

    def forward(self, inputs: CopyInputs) -> tuple[Tensor, Tensor]:
        """Tokens and odds (B, N, 2 H C), C the smaller of K and ``copy_top_k``."""
        memory, slots = inputs.memory, inputs.found.slots[..., : self.nearest]
        own = memory.token_ids.long()
        # The newest pair is followed by the segment's first token, which every query knows.
        newest = (memory.written - memory.origin - 1) % memory.size
        first = inputs.input_ids[:, :1].to(own.device)
        after = own.roll(-1, 1).scatter(1, newest[:, None], first)
        tokens = torch.stack(
            [x.gather(1, slots.flatten(1)).view(slots.shape) for x in (own, after)]
        )
        weights = inputs.found.weights[..., : self.nearest].to(inputs.hidden.device)
        sharpness = weights.detach().amax(-1)
        log_odds = self.log_odds[:, None, :, None] + self.sharpness[:, None, :, None] * sharpness
        log_odds = log_odds + (inputs.hidden @ self.hidden.t()).permute(2, 0, 1)[:, :, None]
        odds = log_odds.exp()[..., None] * weights
        tokens, odds = (x.permute(1, 3, 0, 2, 4).flatten(2) for x in (tokens.to(odds.device), odds))
        return tokens, odds


class RepeatCopies(nn.Module):
    """The tokens that followed where the last tokens occurred before in memory and segment.

    Candidates share the odds by the length of their match, their distance and the model's own
    probability of them; the odds depend on the longest match, on how much the candidates agree, on
    what the model expects, and on the hidden state.

    Args:
        num_heads: not used.
        d_model: width of the hidden states.
        config: the memory's settings.
    """

    def __init__(self, num_heads: int, d_model: int, config: MemoryConfig) -> None:
        super().__init__()
        self.search = RepeatSearch()
        lengths = torch.arange(self.search.longest + 1.0)
        self.log_odds = nn.Parameter(torch.full_like(lengths, math.log(_odds(config.copy_init))))
        """By the longest match."""
        self.by_length = nn.Parameter(math.log(2) * lengths)
        """Log weight of a candidate by its match; at first a token more doubles it."""
        self.slope = nn.Parameter(torch.zeros(()))
        self.toward_likely = nn.Parameter(torch.zeros(()))
        self.features = nn.Parameter(torch.zeros(4))
        self.hidden = nn.Parameter(torch.zeros(d_model))

    def forward(self, inputs: CopyInputs) -> tuple[Tensor, Tensor]:
        """Tokens and odds (B, N, C)."""
        device = inputs.hidden.device
        repeats = self.search(inputs.input_ids, inputs.memory)
        count = inputs.logits.shape[1]
        tokens, lengths, distances = (x[:, -count:].to(device) for x in repeats)
        known = lengths > 0
        score = self.by_length[lengths] - self.slope * torch.log1p(distances / 64)
        score = score + self.toward_likely * inputs.log_probability(tokens)
        # Not minus infinity: where nothing is known its softmax would have no gradient.
        weights = score.masked_fill(~known, -1e9).softmax(-1).masked_fill(~known, 0.0)
        vocab_size = inputs.logits.shape[-1]
        tokens, weights = sum_by_token(tokens, weights, vocab_size)
        agreed, best = weights.max(-1)
        best_token = tokens.gather(-1, best[..., None])
        surest = inputs.logits.argmax(-1, keepdim=True)
        likely = inputs.log_probability(torch.cat([best_token, surest], -1))
        different = (weights > 0).sum(-1, keepdim=True).log1p()
        features = torch.cat([agreed[..., None], likely, different], -1)
        log_odds = self.log_odds[lengths.amax(-1)] + features @ self.features
        log_odds = log_odds + inputs.hidden @ self.hidden
        return tokens, log_odds.exp()[..., None] * weights


COPIES: dict[str, type[NeighbourCopies | RepeatCopies]] = {
    "neighbours": NeighbourCopies,
    "repeats": RepeatCopies,
}
"""By their name in ``model.memory.copy``."""


class CopyHead(nn.Module):
    """Changes logits so that their softmax is the mixture with all sources: it sums to 1.

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

    def forward(
        self, logits: Tensor, hidden: Tensor, input_ids: Tensor, memory: Readable, found: Retrieval
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N, V) of the mixture, and the weight (B, N) of the copies in it, detached.

        ``logits`` are overwritten.

        Args:
            logits: (B, N, V) of the model.
            hidden: (B, N, d_model) normalised hidden states, of unit root mean square.
            input_ids: (B, n + N) of the segment, up to these N tokens.
            memory: the last memory layer's, of these B rows.
            found: what that layer retrieved, live.
        """
        with torch.autocast(logits.device.type, enabled=False):
            inputs = CopyInputs(
                hidden.float(),
                logits.detach(),
                log_total(logits.detach()),
                input_ids,
                memory,
                found,
            )
            parts = [source(inputs) for source in self.sources.values()]
            tokens, odds = (torch.cat(x, -1) for x in zip(*parts, strict=True))
            tokens, odds = sum_by_token(tokens, odds, logits.shape[-1])
            read = found.read.any(1)[..., None].to(odds.device)
            used = read & (odds > 0)
            # A logarithm of 0 would have no gradient.
            log_odds = odds.masked_fill(~used, 1.0).log().masked_fill(~used, -torch.inf)
        mixed: Tensor = _MixIn.apply(logits, tokens, log_odds, inputs.log_total)
        copied = odds.detach().masked_fill(~used, 0.0).sum(-1)
        return mixed, copied / (1 + copied)


def sum_by_token(tokens: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Adds up the weights of candidates that are the same token.

    Args:
        tokens: (B, N, C) int64.
        weights: (B, N, C) fp32.
        vocab_size: tokens V that there are.

    Returns:
        tokens and sums (B, N, C): each token of a position once, with its sum; all other places
        have the sum 0.
    """
    if vocab_size > DENSE * tokens.shape[-1]:
        tokens, order = tokens.sort(-1)
        first = torch.ones_like(tokens, dtype=torch.bool)
        first[..., 1:] = tokens[..., 1:] != tokens[..., :-1]
        run = first.cumsum(-1) - 1
        sums = torch.zeros_like(weights).scatter_add(-1, run, weights.gather(-1, order))
        # All candidates of a run write the same token.
        return torch.zeros_like(tokens).scatter_(-1, run, tokens), sums
    shape = (*tokens.shape[:2], vocab_size)
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    last = place.new_zeros(shape).scatter_reduce_(-1, tokens, place, "amax")
    sums = weights.new_zeros(shape).scatter_add(-1, tokens, weights).gather(-1, tokens)
    return tokens, sums.masked_fill(last.gather(-1, tokens) != place, 0.0)


def log_total(logits: Tensor) -> Tensor:
    """Log of the summed exponentials (B, N) of logits (B, N, V), at least in fp32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = logits.split(CHUNK, dim=1)
    return torch.cat([part.to(wide).logsumexp(-1) for part in parts], 1)


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
            before = (logits[part].to(above) - total[part][..., None]).exp_()
            at = before.gather(-1, tokens[part])
            before.scatter_add_(-1, tokens[part], at * torch.expm1(-F.softplus(above[part])))
            result[part] += before.mul_(sums[part])
        result.scatter_add_(-1, tokens, -change.to(result.dtype))
        return result, None, change, None
