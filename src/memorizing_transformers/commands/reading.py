"""What the commands that read documents share: the model, its memories, progress."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.tokens.tokenized_text import read_text
from ..data.tokens.tokenizers import Encoder, fingerprint_tokenizer, make_encoder
from ..errors import ConfigError
from ..generation.library import CAPACITY, Library, adding, is_library
from ..generation.remembered import Passage, join, load
from ..generation.session import Session
from ..training.checkpoint.opening import AnyModel, open_for_use, place

SUFFIX = ".memory"


@dataclass
class Reader:
    """A model with its tokenizer, which reads documents.

    Args:
        model: in evaluation mode.
        segment_length: tokens of a segment.
        memory_size: slots of each memory that were asked for; None for the model's own.
    """

    model: AnyModel
    segment_length: int
    memory_size: int | None = None

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _encode(self) -> Encoder:
        return make_encoder(self.tokenizer)

    def ids(self, text: str) -> torch.Tensor:
        """Token ids (1, N) of a text, as training makes them."""
        ids = torch.from_numpy(self._encode(text).astype("int64"))[None]
        return ids.to(next(self.model.parameters()).device)

    def read(self, session: Session, path: str) -> Passage:
        """Read a document on a progress bar.

        Raises:
            ConfigError: where it cannot be read.
        """
        return self.read_on(session, Path(path).name, read_text(Path(path)))

    def read_on(self, session: Session, name: str, text: str) -> Passage:
        """Read a text on a progress bar, and say which positions of the memory it has.

        Args:
            session: of one row.
            name: of the document.
            text: what it holds.
        """
        ids = self.ids(text)
        passage = Passage(name, session.count, 0, ids.shape[1])
        with tqdm(
            total=ids.shape[1], desc=name, unit=" tokens", file=sys.stderr, disable=None
        ) as bar:
            for part, _ in session.parts(ids):
                bar.update(part.shape[1])
        return passage

    def add_to(
        self,
        folder: Path,
        document: str,
        segment_length: int | None,
        memory_size: int | None,
        capacity: int | None,
    ) -> None:
        """Read a document on a progress bar, add it to a library, and say what that holds then.

        Args:
            folder: of the library; a new one is made.
            document: a text file.
            segment_length: None for the library's own, or the model's for a new one.
            memory_size: slots of the memory that reads it; None for the model's own.
            capacity: pairs that a new library has room for; None for the default.

        Raises:
            ConfigError: where it cannot be read or added.
        """
        ids, name = self.ids(read_text(Path(document))), Path(document).name
        facts = (folder, self.model, self.fingerprint)
        with adding(folder):
            if is_library(folder):
                library = Library(*facts)
            else:
                library = Library.create(*facts, self.segment_length, capacity or CAPACITY)
            length = library.catalogue.segment_length
            given = {"segment_length": segment_length, "capacity": capacity}
            for key, value in given.items():
                known = getattr(library.catalogue, key)
                if value not in (None, known):
                    raise ConfigError(key, value, f"{folder} was begun with {known}; leave it out")
            bank = self.model.new_memory(1, size=memory_size)
            session = Session(self.model, 1, length, bank)
            with tqdm(
                total=ids.shape[1], desc=name, unit=" tokens", file=sys.stderr, disable=None
            ) as bar:
                for count in library.add(session, ids, name):
                    bar.update(count)
        whole = library.catalogue
        print(f"tokens: {ids.shape[1]:,}")
        print(f"documents in {folder}: {len(whole.documents):,} with {whole.tokens:,} tokens")

    def recall(self, files: Sequence[str]) -> tuple[Session, list[Passage]]:
        """What files of ``remember`` hold, together.

        Args:
            files: each a file, or a folder of files that end in .memory; or one index.

        Raises:
            ConfigError: where there is none, or one cannot be used.
        """
        if any(is_library(Path(file)) for file in files):
            if len(files) > 1:
                raise ConfigError("memory", " ".join(files), "an index is read alone; give one")
            library = Library(Path(files[0]), self.model, self.fingerprint)
            session = Session(self.model, 1, library.catalogue.segment_length)
            library.attach(session)
            return session, library.passages
        paths: list[Path] = []
        for file in files:
            path = Path(file)
            inside = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
            if not inside:
                raise ConfigError("memory", file, f"holds no file that ends in {SUFFIX}")
            paths += inside
        sessions, names, size = [], [], self.memory_size
        several = len(paths) > 1
        for path in tqdm(paths, desc="memories", file=sys.stderr, disable=None):
            session, name = load(path, self.model, self.fingerprint, several, size)
            sessions.append(session)
            names.append(name)
        return join(sessions, names, self.model.config.memory.size, size)


def open_reader(
    model: str, segment_length: int | None, memory_size: int | None, device: str | None
) -> Reader:
    """The model of a folder.

    Args:
        model: the folder.
        segment_length: None for the model's own.
        memory_size: slots of each memory; None for the model's own.
        device: None for a GPU where there is one.

    Raises:
        ConfigError: where one of them cannot work.
    """
    try:
        opened, segment = open_for_use(model, segment_length, memory_size)
    except ConfigError as error:
        if memory_size and error.key.endswith("memory.top_k"):
            remedy = f"must be 0, or at least the pairs that a query retrieves ({error.value})"
            raise ConfigError("memory_size", memory_size, remedy) from error
        raise
    place(opened, device)
    return Reader(opened, segment, memory_size)
