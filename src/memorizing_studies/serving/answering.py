"""Answers of a model, piece by piece, as its tokens come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextIteratorStreamer,
    set_seed,
)

from memorizing_transformers.generation.causal_lm import SessionCache, causal_lm
from memorizing_transformers.generation.sources import Sources

from .conversations import Conversation, Conversations


@dataclass
class Answer:
    """What is known of an answer when it is complete."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: str = "length"
    """``stop`` where the model or a stop text ended it, ``length`` where it was cut."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """By token: the token, the share of the memory, and the passages that weighed most."""


class Until:
    """Passes text on up to the first stop text, and holds back what may be the start of one.

    Args:
        stops: the stop texts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.found = [*stops], "", False

    def push(self, text: str) -> str:
        """Text that can be shown now."""
        if self.found:
            return ""
        whole = self.held + text
        places = [place for place in map(whole.find, self.stops) if place >= 0]
        if places:
            self.held, self.found = "", True
            return whole[: min(places)]
        longest = max(map(len, self.stops), default=1) - 1
        keep = next(
            (
                count
                for count in range(min(longest, len(whole)), 0, -1)
                if any(stop.startswith(whole[-count:]) for stop in self.stops)
            ),
            0,
        )
        self.held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def end(self) -> str:
        """What was held back when no more text comes."""
        rest, self.held = self.held, ""
        return rest


class PenaltyOfAll(LogitsProcessor):
    """Makes all tokens of a conversation less likely, also those of turns that were read before.

    Args:
        read: tokens before those that the model is given now.
        penalty: as ``repetition_penalty``.
    """

    def __init__(self, read: Sequence[int], penalty: float) -> None:
        self.read = torch.tensor([[*read]], dtype=torch.int64)
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) after tokens (B, N)."""
        self.read = self.read.to(input_ids.device)
        before = self.read.expand(input_ids.shape[0], -1)
        penalised: torch.Tensor = self.penalty(torch.cat([before, input_ids], 1), scores)
        return penalised


def prompt_of_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of a chat, in the template of the tokenizer.

    Raises:
        ValueError: where it has none, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; ask for completions")
    try:
        made = tokenizer.apply_chat_template(
            [*messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(f"messages: the chat template refuses them ({error})") from error
    return list(made)


def answer(
    conversations: Conversations,
    conversation: Conversation,
    ids: list[int],
    most: int,
    options: dict[str, Any],
    result: Answer,
) -> Iterator[str]:
    """Continue a prompt.

    Args:
        conversations: whose model answers.
        conversation: whose documents are read.
        ids: tokens of the prompt.
        most: tokens of the answer, at most.
        options: temperature, top_p, top_k, repetition_penalty, seed, stop (a list), sources.
        result: filled in when the last piece has come.

    Yields:
        pieces of text.
    """
    reader, tokenizer = conversations.reader, conversations.tokenizer
    session, unread = conversation.begin(ids)
    observer = Sources(conversation.passages, tokenizer)
    session.observer = observer if options["sources"] else None
    cache = SessionCache([session])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    drawn: dict[str, Any] = {"do_sample": False}
    if options["temperature"]:
        drawn = {"do_sample": True, **{k: options[k] for k in ("temperature", "top_p", "top_k")}}
    processors, penalty = LogitsProcessorList(), options["repetition_penalty"]
    if penalty != 1:
        processors.append(PenaltyOfAll(ids[: len(ids) - len(unread)], penalty))
    device = next(reader.model.parameters()).device
    made: list[int] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            set_seed(options["seed"] % 2**32)
            writer: Any = causal_lm(reader.model, session.segment_length, tokenizer)
            whole = writer.generate(
                torch.tensor([unread], device=device),
                past_key_values=cache,
                max_new_tokens=most,
                repetition_penalty=1.0,
                logits_processor=processors,
                stop_strings=options["stop"] or None,
                tokenizer=tokenizer,
                streamer=streamer,
                **drawn,
            )
            made.extend(whole[0, len(unread) :].tolist())
        except Exception as error:  # the thread must not end unseen
            failures.append(error)
            streamer.end()

    # generate gives text to a streamer as it comes, and returns when all is there.
    thread = Thread(target=run)
    thread.start()
    until = Until(options["stop"])
    for text in streamer:
        if shown := until.push(text):
            yield shown
    thread.join()
    if failures:
        raise failures[0]
    if not until.found and (rest := until.end()):
        yield rest
    session.observer = None
    # The last token was drawn and not read.
    conversation.read, conversation.latest = [*ids, *made[:-1]], cache.sessions[0]
    result.prompt_tokens += len(ids)
    result.completion_tokens += len(made)
    ends = getattr(tokenizer, "eos_token_id", None)
    if until.found or (made and made[-1] == ends) or len(made) < most:
        result.ended = "stop"
    if options["sources"]:
        result.sources = [
            {
                "token": tokenizer.decode([token]),
                "memory": round(origin.memory, 4),
                "copied": origin.copied,
                "passages": [vars(source) for source in origin.sources],
            }
            for token, origin in zip(made, observer.origins[-len(made) :], strict=True)
        ]
