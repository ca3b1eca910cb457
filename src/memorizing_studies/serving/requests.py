"""What clients may ask for: the bodies of OpenAI's requests, as far as they are answered here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memorizing_transformers.generation.drawing_bounds import check_drawing

CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of OpenAI's that are not offered, by name, with the values that ask for nothing."""


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of requests have.

    Fields that are not known change nothing, but those in ``CHANGES_NOTHING`` are refused.
    """

    model_config = ConfigDict(extra="allow")

    model: str = ""
    temperature: float = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    conversation: str | None = None
    """Id of the conversation whose documents are read; None for the server's own memory alone."""
    sources: bool = False
    """Whether the answer tells where each token came from."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """Take a null for a field that was left out, as OpenAI does."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def refuse(self) -> GenerationRequest:
        """Refuse what would be ignored though it asks for something."""
        for name, value in (self.model_extra or {}).items():
            if name in CHANGES_NOTHING and value not in CHANGES_NOTHING[name]:
                raise ValueError(f"{name} = {value!r}: is not offered here; leave it out")
        check_drawing(self.temperature, self.repetition_penalty)
        if isinstance(self.stop, list) and not all(self.stop):
            raise ValueError("stop: holds an empty text; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or [])


class CompletionRequest(GenerationRequest):
    """Continue one or several prompts."""

    prompt: str | list[str]
    max_tokens: int | None = Field(16, ge=1)

    @model_validator(mode="after")
    def refuse_empty(self) -> CompletionRequest:
        """Refuse a prompt without text."""
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompt: is empty; give a text to continue")
        return self

    @property
    def prompts(self) -> list[str]:
        """All of them."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def most(self) -> int | None:
        """Tokens of an answer, at most; None for the server's limit."""
        return self.max_tokens


class ChatRequest(GenerationRequest):
    """Answer the messages of a chat."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def only_text(self) -> ChatRequest:
        """Join the parts of messages, and refuse what is no text."""
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and all(
                isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
            ):
                message["content"] = content = "".join(part["text"] for part in content)
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise ValueError("messages: each needs a role and a content that is text")
        return self

    @property
    def most(self) -> int | None:
        """Tokens of an answer, at most; None for the server's limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> list[str]:
        """None: messages take their place."""
        return []
