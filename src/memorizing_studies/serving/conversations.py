"""Conversations of a server: each has a memory of its own, which ends with it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from memorizing_transformers.commands.reading import Reader
from memorizing_transformers.errors import UserError
from memorizing_transformers.generation.remembered import Passage
from memorizing_transformers.generation.session import Session


class NoSuchConversation(UserError):
    """An id that no open conversation has."""


class TooManyConversations(UserError):
    """One more conversation than the server holds at once."""


@dataclass
class Conversation:
    """What one client has let the model read.

    Args:
        session: that has read the documents; never read on with a prompt.
        passages: what its memory holds of which document.
    """

    session: Session
    passages: list[Passage]
    used: float = field(default_factory=time.monotonic)
    """When it was asked for last, in seconds of the monotonic clock."""
    read: list[int] = field(default_factory=list)
    """Tokens of the last prompt and its answer, which ``latest`` has read."""
    latest: Session | None = None

    def begin(self, ids: list[int]) -> tuple[Session, list[int]]:
        """A session to answer with, and the tokens of a prompt that it has not read yet.

        A prompt that begins with the last one and its answer, as the messages of a chat do, is read
        on from there.
        """
        count = len(self.read)
        if self.latest is not None and count < len(ids) and ids[:count] == self.read:
            return self.latest.take([0]), ids[count:]
        return self.session.take([0]), ids


class Conversations:
    """All open conversations, and the memory that each of them begins with.

    Args:
        reader: the model.
        memory: files of ``remember``, or folders of them, that all conversations read.
        most: conversations that may be open at once.
        idle: seconds after which one that was not used is closed.
    """

    def __init__(self, reader: Reader, memory: list[str], most: int, idle: float) -> None:
        self.reader, self.most, self.idle = reader, most, idle
        self._open: dict[str, Conversation] = {}
        if memory:
            self._session, self._passages = reader.recall(memory)
        else:
            self._session, self._passages = Session(reader.model, 1, reader.segment_length), []

    def alone(self) -> Conversation:
        """One for a single request, which nobody else can ask for."""
        return Conversation(self._session.take([0]), [*self._passages])

    def open(self) -> str:
        """Begin one.

        Returns:
            its id, which nobody can guess.

        Raises:
            TooManyConversations: where ``most`` are open.
        """
        self.close_idle()
        if len(self._open) >= self.most:
            raise TooManyConversations(
                f"{self.most} conversations are open; delete one, or start the server with more "
                "--max_conversations"
            )
        name = f"conv_{secrets.token_urlsafe(16)}"
        self._open[name] = self.alone()
        return name

    def find(self, name: str | None) -> Conversation:
        """An open one, or for None one of its own.

        Raises:
            NoSuchConversation: where none has this id.
        """
        self.close_idle()
        if name is None:
            return self.alone()
        if name not in self._open:
            raise NoSuchConversation(
                f"conversation = {name!r}: is not open; begin one with POST /v1/conversations"
            )
        found = self._open[name]
        found.used = time.monotonic()
        return found

    def close(self, name: str) -> None:
        """End one; its memory is freed.

        Raises:
            NoSuchConversation: where none has this id.
        """
        self.find(name)
        del self._open[name]

    def close_idle(self) -> None:
        """End those that were not used for long."""
        limit = time.monotonic() - self.idle
        for name in [name for name, one in self._open.items() if one.used < limit]:
            del self._open[name]

    def add_document(self, name: str, title: str, text: str) -> Passage:
        """Let a conversation read a document.

        Args:
            name: id of the conversation.
            title: of the document.
            text: what it holds.

        Raises:
            NoSuchConversation: where none has this id.
        """
        found = self.find(name)
        # A copy reads, so one that fails half-way leaves the conversation as it was.
        session = found.session.take([0])
        passage = self.reader.read_on(session, title, text)
        found.session, found.read, found.latest = session, [], None
        found.passages.append(passage)
        return passage

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.reader.tokenizer
