"""The server: LitServe runs the endpoints, and the model in a process of its own."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import litserve
from fastapi import Depends, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

from memorizing_transformers.commands.reading import open_reader
from memorizing_transformers.data.tokens.tokenized_text import text_of
from memorizing_transformers.errors import ConfigError, UserError

from .answering import Answer, answer, prompt_of_chat
from .conversations import Conversations, NoSuchConversation, TooManyConversations
from .endpoints import MemorySpec, as_error, as_refusal

HOSTS = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "0.0.0.0": "0.0.0.0", "::": "::"}
"""Addresses that LitServe binds to, by what a user may give."""
STATUS: dict[type[ValueError], int] = {NoSuchConversation: 404, TooManyConversations: 429}
"""Of a refusal, where it is not 400."""
OVERHEAD = 65536
"""Bytes of a request in addition to an uploaded document."""


@dataclass(frozen=True)
class Served:
    """What is served, and its limits; see the command for each."""

    model: str
    memory: list[str]
    segment_length: int | None
    memory_size: int | None
    device: str | None
    max_new_tokens: int
    max_conversations: int
    idle_minutes: float
    token: str | None
    address: str
    """Where clients find it."""


class MemoryAPI(litserve.LitAPI):
    """What the model's process does: one request after the other.

    Args:
        served: the model and its limits.
        spec: the endpoints.
    """

    def __init__(self, served: Served, spec: MemorySpec) -> None:
        super().__init__(api_path=spec.api_path, spec=spec)
        self.served = served

    def authorize(
        self,
        given: HTTPAuthorizationCredentials | None = Depends(HTTPBearer(auto_error=False)),  # noqa: B008
    ) -> None:
        """Refuse a request without the token, where there is one."""
        token = self.served.token
        if token is None:
            return
        shown = "" if given is None else given.credentials
        if not hmac.compare_digest(shown.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong; give it as the api_key")

    def setup(self, device: str) -> None:
        """Open the model and what all conversations remember."""
        served = self.served
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process itself
        try:
            reader = open_reader(
                served.model, served.segment_length, served.memory_size, served.device
            )
            self.conversations = Conversations(
                reader, served.memory, served.max_conversations, 60 * served.idle_minutes
            )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            logging.disable(logging.CRITICAL)  # LitServe would log the traceback
            raise
        print(f"serving {self.spec.name} at {served.address} until Ctrl-C", file=sys.stderr)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return request

    def predict(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What one request gives; a refusal is one of its own, for LitServe logs what is raised."""
        try:
            yield from getattr(self, f"on_{request['kind']}")(request)
        except ValueError as error:  # a UserError is one
            yield {"refused": str(error), "status": STATUS.get(type(error), 400)}

    def encode_response(self, output: Any) -> Iterator[dict[str, Any]]:
        """As it is."""
        yield from output

    def on_open(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Begin a conversation."""
        yield {"id": self.conversations.open()}

    def on_close(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """End one."""
        self.conversations.close(request["conversation"])
        yield {}

    def on_read(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Read a document."""
        title = request["title"]
        text = text_of(request["raw"], title)
        passage = self.conversations.add_document(request["conversation"], title, text)
        yield {"tokens": passage.count}

    def on_chat(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answer a chat."""
        ids = prompt_of_chat(self.conversations.tokenizer, request["messages"])
        yield from self.answers([ids], request)

    def on_completion(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Continue prompts."""
        ids = self.conversations.reader.ids
        yield from self.answers([ids(text)[0].tolist() for text in request["prompts"]], request)

    def answers(
        self, prompts: list[list[int]], request: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The pieces of an answer to each prompt, each with its index, and what ended it."""
        limit = self.served.max_new_tokens
        seed = secrets.randbits(32) if request["seed"] is None else request["seed"]
        options = {**request, "seed": seed}
        conversation = self.conversations.find(request["conversation"])
        for index, ids in enumerate(prompts):
            result = Answer()
            pieces = answer(
                self.conversations,
                conversation,
                ids,
                min(request["most"] or limit, limit),
                options,
                result,
            )
            for text in pieces:
                yield {"index": index, "text": text}
            yield {"index": index, "end": asdict(result)}


def make_server(served: Served, max_upload: int) -> litserve.LitServer:
    """A server that does not run yet.

    Args:
        served: the model and its limits.
        max_upload: bytes of a document, at most.
    """
    spec = MemorySpec(Path(served.model).resolve().name or served.model, max_upload)
    server = litserve.LitServer(
        MemoryAPI(served, spec),
        accelerator="cpu",  # the command's own option names the device
        timeout=False,
        max_payload_size=max_upload + OVERHEAD,
    )
    server.app.add_exception_handler(StarletteHTTPException, as_error)
    server.app.add_exception_handler(RequestValidationError, as_refusal)
    return server


def end_at_signals() -> None:
    """Let SIGINT and SIGTERM end all processes; LitServe ends them at a KeyboardInterrupt alone."""
    own = os.getpid()

    def end(*_: Any) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        os._exit(0)  # the process of the endpoints, which was forked with this

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def run(served: Served, host: str, port: int, max_upload: int) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: where it cannot begin.
    """
    if host not in HOSTS:
        raise ConfigError("host", host, f"must be one of {', '.join(HOSTS)}")
    if not 1024 <= port <= 65535:
        raise ConfigError("port", port, "must lie in 1024 to 65535")
    token = served.token or "none"
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("token", "(hidden)", "must be of ASCII characters, without spaces")
    if HOSTS[host] != "127.0.0.1" and served.token is None:
        print(
            f"warning: {host} is open to other machines, and there is no --token", file=sys.stderr
        )
    server = make_server(served, max_upload)
    end_at_signals()
    # LitServe's queues go with the process; Python would warn of them at the end.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    try:
        server.run(
            host=HOSTS[host],
            port=port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
        )
    except RuntimeError:  # the model's process has said why
        sys.exit(2)
    except (OSError, SystemExit) as error:
        raise ConfigError("port", port, "cannot be listened at; give another one") from error
