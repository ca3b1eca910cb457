"""Files of tokens that datatrove wrote, as documents.

``NAME.ds`` holds token ids of 2 or 4 bytes, lowest byte first. ``NAME.ds.index`` holds where each
document ends, in tokens, as numbers of 8 bytes. ``NAME.ds.metadata`` is text whose first line names
the tokenizer, and after a bar the bytes of an id; ``NAME.ds.loss`` is a mask.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..settings import Grouping
from .documents import Document, Entry, Origin, Source, UniqueNames, Wanted, first_line, readable
from .files import FoundFile, place_of
from .text_files import hash_file

KIND = ".ds"
INDEX = ".index"
METADATA = ".metadata"
LOSS = ".loss"
ID_BYTES = (2, 4)


def index_of(location: str) -> str:
    """The path of the file that says where documents end in a file of tokens."""
    return location + INDEX


def token_files(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Those of the files that hold tokens; a text whose name ends alike has no index."""
    return [
        file
        for file in files
        if file.location.endswith(KIND) and os.path.isfile(index_of(file.location))
    ]


class TokenFiles(Source):
    """Documents that have tokens and no text; their text comes from the tokenizer.

    Args:
        files: all files of the source; others than those of tokens and what belongs to them are
            refused.
        group: must be ``file``: the documents are made already.
        origin: the setting to name in errors.

    Raises:
        ConfigError: other files, another grouping, or a file that its index does not fit.
    """

    def __init__(self, files: Sequence[FoundFile], group: Grouping, origin: Origin) -> None:
        super().__init__()
        self.origin = origin
        self.files = token_files(files)
        own = {file.location + end for file in self.files for end in ("", INDEX, METADATA, LOSS)}
        others = [file for file in files if file.location not in own]
        first = readable(self.files[0].name)
        if others:
            raise origin.error(
                f"{first} holds tokens, {readable(others[0].name)} does not; give the files of "
                "tokens a folder of their own"
            )
        if group != "file":
            raise origin.error(
                f"{first} holds documents as tokens, which data.group = {group!r} cannot join; set "
                "it to 'file'"
            )
        masks = sum(os.path.exists(file.location + LOSS) for file in self.files)
        if masks:
            self.notes.append(f"{origin.value}: loss masks of {masks} files are not used")
        self._ends = {file: self._read_ends(file) for file in self.files}
        self.made_by = self._tokenizer_name()

    def entries(self) -> Iterator[Entry]:
        """The documents' names, in order."""
        for file in self.files:
            for number in range(len(self._ends[file])):
                yield Entry(f"{file.name}-{number:06d}", self._no_text)

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """The documents with their tokens, mapped from disk, and an empty text."""
        unique = UniqueNames()
        for file in self.files:
            ends = self._ends[file].tolist()
            tokens = self._tokens(file)
            for number, (start, end) in enumerate(pairwise([0, *ends])):
                name = unique.take(readable(f"{file.name}-{number:06d}"))
                if wanted(name):
                    yield Document(name, "", tokens[start:end])

    def fingerprint(self) -> str:
        """Hash of the files' names, of their tokens and of their indices."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(f"tokens {readable(file.name)}\n".encode())
            for location in (file.location, index_of(file.location)):
                digest.update(hash_file(location, self.origin))
        return digest.hexdigest()

    def places(self) -> set[Hashable]:
        """The files of tokens."""
        return {place_of(file.location) for file in self.files}

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read none of these files."""
        self.files = [file for file in self.files if place_of(file.location) not in places]

    def _read_ends(self, file: FoundFile) -> NDArray[np.int64]:
        """(D,) where each document of a file ends, in tokens."""
        try:
            ends = np.fromfile(index_of(file.location), "<u8").astype(np.int64)
            size = os.path.getsize(file.location)
        except OSError as error:
            remedy = f"cannot read {readable(file.name)} ({first_line(error)}); mend or remove it"
            raise self.origin.error(remedy) from error
        count = int(ends[-1]) if len(ends) else 0
        if (np.diff(ends, prepend=0) < 0).any() or size not in [count * n for n in ID_BYTES]:
            raise self.origin.error(
                f"{readable(file.name)} has {size:,} bytes, but its index ends at token {count:,}; "
                "write both anew, or leave it out"
            )
        return ends

    def _tokens(self, file: FoundFile) -> NDArray[Any]:
        """All tokens of a file."""
        ends = self._ends[file]
        if not len(ends) or not ends[-1]:
            return np.empty(0, np.uint16)
        size = os.path.getsize(file.location) // int(ends[-1])
        return np.memmap(file.location, f"<u{size}", mode="r")

    def _tokenizer_name(self) -> str:
        """What the first file with such a line says of the tokenizer."""
        for file in self.files:
            try:
                with open(file.location + METADATA, encoding="utf-8") as stream:
                    return readable(stream.readline().strip().rpartition("|")[0])
            except (OSError, UnicodeDecodeError):
                continue
        return "not named"

    def _no_text(self) -> NoReturn:
        raise self.origin.error("holds tokens and no text; give the texts that they were made of")
