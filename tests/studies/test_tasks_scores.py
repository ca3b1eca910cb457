"""Scores of parts in the tokens of any tokenizer, and of models that give no numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from task_texts import bpe, latex
from test_task_scoring import SEGMENT, copying_model, read_whole

from memorizing_studies.tasks.continuations import Encoder
from memorizing_studies.tasks.items import Item
from memorizing_studies.tasks.key_tokens import losses_of
from memorizing_studies.tasks.scoring import Arm, score_items
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, train_bpe
from memorizing_transformers.errors import UserError


def part(begin: int, end: int) -> Item:
    return Item(place=begin, end=end, x=0, distance=0, chance=0.0)


def losses(arm: Arm, encoder: Encoder, text: str) -> list[float]:
    """The loss of each token but the first."""
    return (-read_whole(arm, encoder.text(text).ids.tolist())).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_part_is_scored_by_the_tokens_that_hold_it(seed: int) -> None:
    """Whatever its ends: those of tokens, or places within them."""
    tokenizer = bpe()
    arm, encoder = Arm("arm", copying_model(vocab_size=len(tokenizer)), SEGMENT), Encoder(tokenizer)
    text = latex(seed, 3)[:300]
    ends = encoder.text(text).ends.tolist()
    whole, draw = losses(arm, encoder, text), random.Random(seed)
    places = [sorted(draw.sample(range(20, 301), 2)) for _ in range(60)]
    places += [[300 - 1, 300], [299 - 1, 299]]
    scores = score_items(arm, encoder, text, [part(a, b) for a, b in places])
    for (a, b), score in zip(places, scores, strict=True):
        spans = zip([0, *ends], ends, strict=False)
        own = [n for n, (begin, end) in enumerate(spans) if begin < b and end > a]
        assert score.tokens == len(own)
        assert score.nats == pytest.approx(sum(whole[n - 1] for n in own) / len(own), abs=1e-3)


def test_parts_of_other_tokenizers_lie_within_tokens() -> None:
    """Parts within the last token, and within a token before others."""
    tokenizer = train_bpe(["it was read, it was read"] * 9, 300)
    arm, encoder = Arm("arm", copying_model(vocab_size=len(tokenizer)), SEGMENT), Encoder(tokenizer)
    text = "it was read, it was read"
    assert encoder.text(text).pieces()[-3:] == [" it", " was", " read"]
    whole = losses(arm, encoder, text)
    last, inner = score_items(arm, encoder, text, [part(22, 23), part(17, 18)])
    assert (last.tokens, inner.tokens) == (1, 1)
    assert last.nats == pytest.approx(whole[-1], abs=1e-3)
    assert inner.nats == pytest.approx(whole[-2], abs=1e-3)


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    model: Any = copying_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))
    arm, encoder, text = Arm("memory on", model, SEGMENT), Encoder(byte_tokenizer()), latex()[:200]
    choice = Item(place=90, x=0, distance=0, chance=0.5, candidates=("ab", "cd"), after="}")
    words = "^memory on: the model's logits are not finite; give another checkpoint"
    for item in (choice, part(90, 99)):
        with pytest.raises(UserError, match=words):
            score_items(arm, encoder, text, [item])
    with pytest.raises(UserError, match=words):
        losses_of(arm, encoder, text)
