"""Scores items: reads a text once, and asks copies of what was read at the places of the items.

Shapes: B candidates read together, m of their tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorizing_transformers.data.tokens.tokenized_text import TokenizedText
from memorizing_transformers.errors import UserError
from memorizing_transformers.generation.session import Session
from memorizing_transformers.training.checkpoint.opening import AnyModel

from .continuations import Encoder, start_of, tokens_before, tokens_up_to
from .items import Item

BYTES = 2**28
"""Largest size of the logits, or of copied memories, of candidates that are read together."""


@dataclass(frozen=True)
class Score:
    """How well one item was answered."""

    right: float
    """1 where the right candidate is the likeliest, 0 where not; equally likely ones share the 1.
    Of a part, the share of its tokens that are the likeliest."""
    nats: float
    """Loss of the right candidate, summed over its tokens, or of a part, the mean of its tokens."""
    tokens: int
    """Tokens that were looked at."""
    reciprocal_rank: float | None = None
    """1 / rank of the right candidate; None for a part."""


@dataclass(frozen=True)
class Arm:
    """A model as it is read with.

    Args:
        name: e.g. ``memory on``.
        model: in evaluation mode, with its tokenizer.
        segment: tokens N that are read at once.
        size: slots of each memory; None for the model's own, 0 to switch it off.
    """

    name: str
    model: AnyModel
    segment: int
    size: int | None = None

    def session(self) -> Session:
        """A session that has read nothing."""
        return Session(self.model, 1, self.segment, self.model.new_memory(1, size=self.size))


def log_likelihoods(session: Session, last: Tensor, input_ids: Tensor, rest: bool) -> Tensor:
    """The log-likelihood (B, m) of each token, in nats; the session reads on.

    Args:
        session: of B rows.
        last: (B, V) logits after what the session has read.
        input_ids: (B, m) the tokens.
        rest: whether the last token is read too.
    """
    wanted = input_ids if rest else input_ids[:, :-1]
    logits, count = [last[:, None]], 0
    if wanted.shape[1]:
        for part, output in session.parts(wanted):
            assert output.logits is not None
            logits.append(output.logits)
            count += part.shape[1]
            if count == wanted.shape[1] and not rest:
                break  # the pairs of a full segment need not be written: nothing follows
    whole = torch.cat(logits, 1)
    picked = whole[:, : input_ids.shape[1]].float().log_softmax(-1)
    if rest:
        last.copy_(whole[:, -1])
    return picked.gather(-1, input_ids[..., None])[..., 0]


def score_candidates(
    session: Session, last: Tensor, candidates: Sequence[list[int]], unscored: int = 0
) -> list[float]:
    """The log-likelihood of each candidate in nats; the session stays as it is.

    Args:
        session: of one row, that has read what lies before.
        last: (1, V) logits after that.
        candidates: tokens of each.
        unscored: tokens at the start of all that are read and not counted.
    """
    memories = dict(session.bank.memories)
    fork, last = session.take([0]), last.clone()
    shared = next(
        (n for n, column in enumerate(zip(*candidates, strict=False)) if len({*column}) > 1),
        min(map(len, candidates)),
    )
    device = last.device
    total = 0.0
    if shared:
        begin = torch.tensor([candidates[0][:shared]], device=device)
        total = float(log_likelihoods(fork, last, begin, rest=True)[:, unscored:].sum())
    rests = [candidate[shared:] for candidate in candidates]
    longest = max(map(len, rests))
    scores: list[float] = []
    rows = rows_at_once(fork, longest, last.shape[-1])
    for start in range(0, len(rests) if longest else 0, rows):
        chunk = rests[start : start + rows]
        ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in chunk], device=device)
        several = fork.take([0] * len(chunk))
        found = log_likelihoods(several, last.expand(len(chunk), -1), ids, rest=False)
        counts = torch.tensor([len(one) for one in chunk], device=device)
        padding = torch.arange(longest, device=device) >= counts[:, None]
        scores += found.double().masked_fill(padding, 0.0).sum(1).tolist()
    # The copies only looked at the memories, so the session can write to them again.
    session.bank.memories = memories
    return [total + score for score in scores or [0.0] * len(candidates)]


def rows_at_once(session: Session, count: int, vocabulary: int) -> int:
    """Candidates of ``count`` tokens that are read together."""
    rows = BYTES // (4 * vocabulary * max(1, count))
    if session.open.count + count > session.segment_length:
        # Each row ends the segment with pairs of its own, so each has a copy of the memory.
        memories = session.bank.memories.values()
        rows = min(rows, BYTES // max(1, sum(memory.base.nbytes() for memory in memories)))
    return max(1, rows)


def rate(scores: Sequence[float], answer: int, tokens: int) -> Score:
    """The score of a choice, of the log-likelihood of each candidate."""
    own = scores[answer]
    better = sum(score > own for score in scores)
    same = sum(score == own for score in scores)  # itself among them
    right = 0.0 if better else 1.0 / same
    return Score(right, -own, tokens, 1.0 / (better + (same + 1) / 2))


def score_items(
    arm: Arm,
    encoder: Encoder,
    text: str,
    items: Sequence[Item],
    advance: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """The scores of items of one text, which is read up to the last of them.

    Args:
        arm: what reads.
        encoder: of the arm's tokenizer.
        text: the text.
        items: in any order.
        advance: is told how many characters were read, each time.

    Raises:
        UserError: where the model's logits are not finite.
    """
    tokens = encoder.text(text)
    scores: dict[int, Score] = {}
    choices = {n: encoder.choice(tokens, item) for n, item in enumerate(items) if item.candidates}
    parts = {n: _part(tokens, item) for n, item in enumerate(items) if not item.candidates}
    losses = np.zeros((2, len(tokens)))
    last_part = max((last for _, last in parts.values()), default=0)
    session, last = arm.session(), None
    device = next(arm.model.parameters()).device
    ids = torch.from_numpy(tokens.ids)[None].to(device)
    stops = sorted(choices, key=lambda number: choices[number].start)
    for number in [*stops, None]:
        until = last_part - 1 if number is None else choices[number].start
        if until > session.count:
            begin = session.count
            for part, output in session.parts(ids[:, begin:until]):
                assert output.logits is not None
                end = begin + part.shape[1]
                if begin + 1 < last_part:
                    note_losses(losses, output.logits[0], ids[0], begin)
                last, begin = output.logits[:, -1], end
                advance(start_of(tokens, end) - start_of(tokens, end - part.shape[1]))
        if number is not None and last is not None:
            choice, answer = choices[number], items[number].answer
            found = score_candidates(session, last, choice.candidates, choice.unscored)
            refuse_no_number(arm, found)
            count = len(choice.candidates[answer]) - choice.unscored
            scores[number] = rate(found, answer, count)
    for number, (first, stop) in parts.items():
        nats, right = losses[:, first:stop].mean(1).tolist()
        refuse_no_number(arm, [nats])
        scores[number] = Score(right, nats, stop - first)
    return [scores[number] for number in range(len(items))]


def _part(tokens: TokenizedText, item: Item) -> tuple[int, int]:
    """The tokens that hold an item's part, or some of it, but not the first of the text."""
    first = max(1, tokens_before(tokens, item.place))
    return first, max(first + 1, tokens_up_to(tokens, item.end))


def refuse_no_number(arm: Arm, values: Sequence[float] | NDArray[np.float64]) -> None:
    """Refuse a model whose losses are no numbers.

    Raises:
        UserError: naming the arm.
    """
    if np.isnan(values).any():
        why = "the model's logits are not finite; give another checkpoint"
        raise UserError(f"{arm.name}: {why}")


def note_losses(losses: NDArray[np.float64], logits: Tensor, ids: Tensor, begin: int) -> None:
    """Note the loss of each token that logits (m, V) predict, and whether it was the likeliest."""
    targets = ids[begin + 1 : begin + 1 + len(logits)]
    logits = logits[: len(targets)].float()
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    place = slice(begin + 1, begin + 1 + len(targets))
    losses[0, place] = nats.cpu().numpy()
    losses[1, place] = (logits.argmax(-1) == targets).cpu().numpy()
