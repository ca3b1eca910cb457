"""Where tokens of the memory are copied from: candidates, and their odds against the model.

A source first names its candidates, which need no prediction of the model, and then gives their
odds, in fp32 whatever the weights are stored in; ``mixing`` says what follows from them.

Shapes: B rows, N segment, H query heads, K neighbours, C candidates, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..memory import Readable, RepeatSearch
from .config import MemoryConfig
from .reader import Retrieval

DENSE = 16
"""Tokens of the vocabulary for each candidate up to which a table of all is faster than sorting."""


class CopyInputs(NamedTuple):
    """What a source of copies may look at: all of it is known before the predicted token."""

    hidden: Tensor
    """(B, N, d_model) fp32 what the logits are computed from, of unit root mean square."""
    input_ids: Tensor
    """(B, n + N) of the segment, up to these N tokens."""
    memory: Readable
    """The last memory layer's, of these B rows."""
    found: Retrieval
    """What that layer retrieved; live."""
    vocab_size: int
    """Tokens V that there are."""


class Candidates(NamedTuple):
    """What a source would copy after each token."""

    tokens: Tensor
    """(B, N, C) int64."""
    facts: tuple[Tensor, ...] = ()
    """What the source itself wants to know of them again."""


class OwnForecast(NamedTuple):
    """What the model by itself predicts, in fp32; detached."""

    log_p: Tensor
    """(B, N, C) log-probabilities of the candidates."""
    best_log_p: Tensor
    """(B, N) that of the likeliest token."""


def _odds(weight: float) -> float:
    """Of a candidate's weight in the mixture, its odds against the model."""
    return weight / (1 - weight)


def _bounded_exp(log_odds: Tensor) -> Tensor:
    # Odds beyond e^30 leave the model 1e-13 of the prediction, and e^89 is no number of fp32.
    return log_odds.clamp(max=30.0).exp()


class NeighbourCopies(nn.Module):
    """The tokens of the pairs that the memory layer's heads attend to most, and those after them.

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

    def candidates(self, inputs: CopyInputs) -> Candidates:
        """(B, N, 2 H C), C the smaller of K and ``copy_top_k``."""
        memory, found = inputs.memory, inputs.found
        # A kernel may number a slot that is not valid beyond the memory's end.
        slots = found.slots.masked_fill(~found.valid, 0)
        facts: tuple[Tensor, ...] = ()
        if self.nearest is not None and self.nearest < slots.shape[-1]:
            # A search knows no biases, so its best pairs need not be those of the attention. Among
            # equal ones its order holds.
            weights = found.weights.detach()
            ordered = weights.sort(stable=True, dim=-1, descending=True).indices
            facts = (ordered[..., : self.nearest],)
            slots = slots.gather(-1, facts[0])
        own = memory.token_ids.long()
        # The newest pair is followed by the segment's first token, which every query knows.
        newest = (memory.written - memory.origin - 1) % memory.size
        first = inputs.input_ids[:, :1].to(own.device)
        after = own.roll(-1, 1).scatter(1, newest[:, None], first)
        tokens = torch.stack(
            [x.gather(1, slots.flatten(1)).view(slots.shape) for x in (own, after)]
        )
        tokens = tokens.permute(1, 3, 0, 2, 4).flatten(2)
        return Candidates(tokens.to(inputs.hidden.device), facts)

    def odds(self, inputs: CopyInputs, candidates: Candidates, own: OwnForecast) -> Tensor:
        """(B, N, 2 H C)."""
        weights = inputs.found.weights
        for kept in candidates.facts:
            weights = weights.gather(-1, kept)
        weights = weights.to(inputs.hidden.device)
        sharpness = weights.detach().amax(-1)
        start, slope = (x.float()[:, None, :, None] for x in (self.log_odds, self.sharpness))
        log_odds = start + slope * sharpness
        by_token = inputs.hidden @ self.hidden.float().t()
        log_odds = log_odds + by_token.permute(2, 0, 1)[:, :, None]
        odds = _bounded_exp(log_odds)[..., None] * weights
        return odds.permute(1, 3, 0, 2, 4).flatten(2)


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
        # Of one dimension each: FSDP2 shards no parameter without.
        self.slope = nn.Parameter(torch.zeros(1))
        self.toward_likely = nn.Parameter(torch.zeros(1))
        self.features = nn.Parameter(torch.zeros(4))
        self.hidden = nn.Parameter(torch.zeros(d_model))

    def candidates(self, inputs: CopyInputs) -> Candidates:
        """(B, N, C), with the lengths of their matches and their distances."""
        count = inputs.hidden.shape[1]
        found = self.search(inputs.input_ids, inputs.memory)
        tokens, *facts = (x[:, -count:].to(inputs.hidden.device) for x in found)
        return Candidates(tokens, tuple(facts))

    def odds(self, inputs: CopyInputs, candidates: Candidates, own: OwnForecast) -> Tensor:
        """(B, N, C)."""
        lengths, distances = candidates.facts
        known = lengths > 0
        score = self.by_length.float()[lengths]
        score = score - self.slope.float() * torch.log1p(distances / 64)
        score = score + self.toward_likely.float() * own.log_p
        # Not minus infinity: where nothing is known its softmax would have no gradient.
        weights = score.masked_fill(~known, -1e9).softmax(-1).masked_fill(~known, 0.0)
        sums, once = sum_by_token(candidates.tokens, weights, inputs.vocab_size)
        agreed, best = sums.max(-1)
        likely = own.log_p.gather(-1, best[..., None])
        different = (once & (sums > 0)).sum(-1, keepdim=True).log1p()
        features = [agreed[..., None], likely, own.best_log_p[..., None], different]
        log_odds = self.log_odds.float()[lengths.amax(-1)]
        log_odds = log_odds + torch.cat(features, -1) @ self.features.float()
        log_odds = log_odds + inputs.hidden @ self.hidden.float()
        return _bounded_exp(log_odds)[..., None] * weights


COPIES: dict[str, type[NeighbourCopies | RepeatCopies]] = {
    "neighbours": NeighbourCopies,
    "repeats": RepeatCopies,
}
"""By their name in ``model.memory.copy``."""


def sum_by_token(tokens: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Adds up the weights of candidates that are the same token.

    Args:
        tokens: (B, N, C) int64.
        weights: (B, N, C) fp32.
        vocab_size: tokens V that there are.

    Returns:
        sums (B, N, C): each candidate's token's; and bool (B, N, C): True once for each token.
    """
    if vocab_size > DENSE * tokens.shape[-1]:
        ordered, order = tokens.sort(-1)
        first = torch.ones_like(tokens, dtype=torch.bool)
        first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        run = first.cumsum(-1) - 1
        totals = torch.zeros_like(weights).scatter_add(-1, run, weights.gather(-1, order))
        # Back from the order of tokens to that of candidates.
        place = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(order)
        back = torch.empty_like(order).scatter_(-1, order, place)
        return totals.gather(-1, run.gather(-1, back)), first.gather(-1, back)
    shape = (*tokens.shape[:2], vocab_size)
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    last = place.new_zeros(shape).scatter_reduce_(-1, tokens, place, "amax")
    sums = weights.new_zeros(shape).scatter_add(-1, tokens, weights).gather(-1, tokens)
    return sums, last.gather(-1, tokens) == place
