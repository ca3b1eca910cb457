"""Text files as documents: one per file, or one per group of files."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .compression import open_bytes
from .documents import Entry, Origin, Source, first_line, join_texts, readable
from .files import place_of

HASH_CHUNK = 1 << 20
SNIFF_BYTES = 1024
NO_DOCUMENT = b"<!-- memorizing_transformers: not a document -->"
"""A file that begins with this is left out."""


class TextGroup(NamedTuple):
    """The files, in order, whose texts joined are one document."""

    name: str
    files: list[Path]


class TextFiles(Source):
    """Documents made of text files.

    Files that hold a NUL byte in their first kilobyte are taken for binary and left out, and so are
    files that begin with `NO_DOCUMENT`; bytes that are not UTF-8 are replaced by U+FFFD.

    Args:
        groups: one entry per document.
        origin: the setting to name in errors.

    Raises:
        ConfigError: a file cannot be read, or is a damaged archive.
    """

    def __init__(self, groups: Sequence[TextGroup], origin: Origin) -> None:
        super().__init__()
        self.origin = origin
        self.binary = 0
        self.replaced: set[Path] = set()
        self.groups: list[TextGroup] = []
        for group in groups:
            texts = [file for file in group.files if self._is_text(file)]
            if texts:
                self.groups.append(TextGroup(group.name, texts))

    def entries(self) -> Iterator[Entry]:
        """The documents, in order."""
        for group in self.groups:
            yield Entry(group.name, partial(self._read_group, group.files))

    def fingerprint(self) -> str:
        """Hash of the documents' names and the raw bytes of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for group in self.groups:
            digest.update(f"document {readable(group.name)}\n".encode())
            for file in group.files:
                digest.update(f"file {readable(file.name)}\n".encode())
                digest.update(hash_file(file, self.origin))
        return digest.hexdigest()

    def places(self) -> set[Hashable]:
        """The files."""
        return {place_of(file) for group in self.groups for file in group.files}

    def leave_out(self, places: Collection[Hashable]) -> None:
        """Read none of these files; a group without files is no document."""
        groups = [
            TextGroup(group.name, [file for file in group.files if place_of(file) not in places])
            for group in self.groups
        ]
        self.groups = [group for group in groups if group.files]

    def lines(self) -> list[str]:
        """Lines about binary files and replaced bytes, as far as documents were read."""
        lines = []
        if self.binary:
            lines.append(f"{self.origin.value}: {self.binary} files left out, they look binary")
        if self.replaced:
            lines.append(
                f"{self.origin.value}: bytes that are not UTF-8 replaced by U+FFFD in "
                f"{len(self.replaced)} files, e.g. {readable(min(self.replaced))}"
            )
        return lines

    def _is_text(self, file: Path) -> bool:
        head = self._read(file, SNIFF_BYTES)
        binary = b"\0" in head
        self.binary += binary
        return not binary and not head.startswith(NO_DOCUMENT)

    def _read(self, file: Path, size: int = -1) -> bytes:
        try:
            with open_bytes(file) as stream:
                return stream.read(size)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise self.origin.error(
                f"cannot read {readable(file)} ({first_line(error)}); mend the file or leave it out"
            ) from error

    def _read_group(self, files: Sequence[Path]) -> str:
        return join_texts([self.read_text(file) for file in files])

    def read_text(self, file: Path) -> str:
        """A file as text; one with bytes that are not UTF-8 is noted."""
        raw = self._read(file)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.replaced.add(file)
            return raw.decode("utf-8-sig", errors="replace")


def hash_file(file: Path | str, origin: Origin) -> bytes:
    """Hash of a file's raw bytes, read in chunks.

    Raises:
        ConfigError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise origin.error(f"cannot read {readable(file)} ({first_line(error)})") from error
    return digest.digest()
