"""The endpoints: what comes over HTTP is handed to the process that holds the model.

The paths and bodies are those of OpenAI's API: completions, chat completions, models, conversations
and files.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Form, HTTPException, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from litserve import LitAPI
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem

from .requests import ChatRequest, CompletionRequest

KINDS: dict[str, dict[str, str]] = {
    "chat": {"id": "chatcmpl", "object": "chat.completion", "chunk": "chat.completion.chunk"},
    "completion": {"id": "cmpl", "object": "text_completion", "chunk": "text_completion"},
}
"""Names of OpenAI's for each kind of answer."""


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in the form of OpenAI's."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class MemorySpec(LitSpec):
    """The endpoints of one model with conversations.

    Args:
        name: of the model, as clients see it.
        max_upload: bytes of a document, at most.
    """

    def __init__(self, name: str, max_upload: int) -> None:
        super().__init__()
        self.name, self.max_upload = name, max_upload
        self.api_path = "/v1/chat/completions"

    @property
    def stream(self) -> bool:
        """Answers come in pieces."""
        return True

    def pre_setup(self, lit_api: LitAPI) -> None:
        """Register the paths."""
        for path, endpoint, method in (
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.complete, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.one_model, "GET"),
            ("/v1/conversations", self.open, "POST"),
            ("/v1/conversations/{conversation}", self.close, "DELETE"),
            ("/v1/files", self.upload, "POST"),
        ):
            self.add_endpoint(path, endpoint, [method])

    def decode_request(self, request: dict[str, Any], context_kwargs: Any = None) -> dict[str, Any]:
        """As it is."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """As it is."""
        yield from output

    async def ask(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Let the model's process answer; gives what it yields.

        Raises:
            HTTPException: where it refuses or fails.
        """
        uid, queue, event = uuid.uuid4(), deque[Any](), asyncio.Event()
        self.response_buffer[uid] = ResponseBufferItem(response_queue=queue, event=event)
        try:
            self.request_queue.put((self.response_queue_id, uid, time.monotonic(), request))
            async for piece, status in self.data_streamer(queue, event, send_status=True):
                if status == LitAPIStatus.ERROR:
                    if isinstance(piece, HTTPException):
                        raise piece
                    raise HTTPException(500, "the model failed; see the server's log")
                if not piece:
                    continue
                made = json.loads(piece)
                if "refused" in made:
                    raise HTTPException(made["status"], made["refused"])
                yield made
        finally:
            self.response_buffer.pop(uid, None)

    async def outcome(self, request: dict[str, Any]) -> dict[str, Any]:
        """The only thing that an answer holds."""
        return [piece async for piece in self.ask(request)][-1]

    async def chat(self, request: ChatRequest) -> Any:
        """Answer the messages of a chat."""
        return await self.generate("chat", request)

    async def complete(self, request: CompletionRequest) -> Any:
        """Continue prompts."""
        return await self.generate("completion", request)

    async def generate(self, kind: str, request: ChatRequest | CompletionRequest) -> Any:
        """An answer of either kind, at once or as a stream of events."""
        facts = {
            "id": f"{KINDS[kind]['id']}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        body = {**request.model_dump(), "stop": request.stops, "most": request.most}
        pieces = self.ask({"kind": kind, **body, "prompts": request.prompts})
        # A refusal must come before the head of a stream, which says that all is well.
        first = await anext(pieces)
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            events = self.events(kind, facts, first, pieces, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        texts: dict[int, str] = {}
        ends: dict[int, dict[str, Any]] = {}
        async for piece in chained(first, pieces):
            index = piece["index"]
            texts[index] = texts.get(index, "") + piece.get("text", "")
            if "end" in piece:
                ends[index] = piece["end"]
        choices = []
        for index, end in sorted(ends.items()):
            text: dict[str, Any] = {"text": texts[index]}
            if kind == "chat":
                text = {"message": {"role": "assistant", "content": texts[index], "refusal": None}}
            choices.append({"index": index, "logprobs": None, **text, **reasons(end)})
        return {
            **facts,
            "object": KINDS[kind]["object"],
            "choices": choices,
            "usage": usage_of([*ends.values()]),
        }

    async def events(
        self,
        kind: str,
        facts: dict[str, Any],
        first: dict[str, Any],
        pieces: AsyncIterator[dict[str, Any]],
        usage: bool,
    ) -> AsyncIterator[str]:
        """The events of a stream."""
        head = {**facts, "object": KINDS[kind]["chunk"]}
        ends = []
        try:
            async for piece in chained(first, pieces):
                choice: dict[str, Any] = {"index": piece["index"], "logprobs": None}
                text = piece.get("text", "")
                if kind == "chat":
                    choice["delta"] = {"role": "assistant", "content": text} if text else {}
                else:
                    choice["text"] = text
                choice["finish_reason"] = None
                if "end" in piece:
                    ends.append(piece["end"])
                    choice.update(reasons(piece["end"]))
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            if usage:
                last = {**head, "choices": [], "usage": usage_of(ends)}
                yield f"data: {json.dumps(last)}\n\n"
        except HTTPException as error:
            yield f"data: {json.dumps(error_body(str(error.detail), error.status_code))}\n\n"
        yield "data: [DONE]\n\n"

    async def models(self) -> Any:
        """The one model."""
        return {"object": "list", "data": [await self.one_model(self.name)]}

    async def one_model(self, model: str) -> Any:
        """What is known of the model."""
        if model != self.name:
            raise HTTPException(404, f"model = {model!r}: there is {self.name}")
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "user"}

    async def open(self) -> Any:
        """Begin a conversation."""
        made = await self.outcome({"kind": "open"})
        return {
            "id": made["id"],
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": {},
        }

    async def close(self, conversation: str) -> Any:
        """End a conversation; its memory is freed."""
        await self.outcome({"kind": "close", "conversation": conversation})
        return {"id": conversation, "object": "conversation.deleted", "deleted": True}

    async def upload(
        self, file: UploadFile, purpose: str = Form(""), conversation: str = Form("")
    ) -> Any:
        """Let a conversation read a document."""
        if not conversation:
            remedy = "a document belongs to a conversation; give the id of an open one"
            raise HTTPException(400, f"conversation = '': {remedy}")
        raw = await file.read(self.max_upload + 1)
        if len(raw) > self.max_upload:
            raise HTTPException(
                413, f"the document has more than {self.max_upload:,} bytes (--max_upload)"
            )
        name = file.filename or "document"
        request = {"kind": "read", "conversation": conversation, "title": name, "raw": raw}
        made = await self.outcome(request)
        return {
            "id": f"file-{secrets.token_urlsafe(8)}",
            "object": "file",
            "bytes": len(raw),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
            "tokens": made["tokens"],
        }


async def chained(
    first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    """One, and then the others."""
    yield first
    async for piece in rest:
        yield piece


def reasons(end: dict[str, Any]) -> dict[str, Any]:
    """What a choice says of its end."""
    found: dict[str, Any] = {"finish_reason": end["ended"]}
    if end["sources"]:
        found["sources"] = end["sources"]
    return found


def usage_of(ends: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of all choices."""
    prompt, made = (
        sum(end[name] for end in ends) for name in ("prompt_tokens", "completion_tokens")
    )
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def as_error(_: Any, error: Any) -> JSONResponse:
    """An HTTPException as a response."""
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)


def as_refusal(_: Any, error: Any) -> JSONResponse:
    """A body that is not valid as a response of one line."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"][1:])
    text = str(found["msg"]).removeprefix("Value error, ")
    return JSONResponse(error_body(f"{where}: {text}" if where else text, 400), 400)
