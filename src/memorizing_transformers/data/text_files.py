"""Text files as documents: one per file, or one per group of files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from .documents import Document, Origin, Wanted, first_line

OPENERS: dict[str, Callable[..., IO[bytes]]] = {
    ".gz": cast("Callable[..., IO[bytes]]", gzip.open),
    ".bz2": cast("Callable[..., IO[bytes]]", bz2.open),
    ".xz": cast("Callable[..., IO[bytes]]", lzma.open),
}
HASH_CHUNK = 1 << 20
SNIFF_BYTES = 1024


class TextGroup(NamedTuple):
    """The files, in order, whose texts joined are one document."""

    name: str
    files: list[Path]


class TextFiles:
    """Documents made of text files.

    Files that hold a NUL byte in their first kilobyte are taken for binary and left out; bytes that
    are not UTF-8 are replaced by U+FFFD.

    Args:
        groups: one entry per document.
        origin: the setting to name in errors.

    Raises:
        ConfigError: a file cannot be read, or is a damaged archive.
    """

    def __init__(self, groups: Sequence[TextGroup], origin: Origin) -> None:
        self.origin = origin
        self.binary = 0
        self.replaced: set[Path] = set()
        self.groups: list[TextGroup] = []
        for group in groups:
            texts = [file for file in group.files if not self._is_binary(file)]
            self.binary += len(group.files) - len(texts)
            if texts:
                self.groups.append(TextGroup(group.name, texts))

    def names(self) -> Iterator[str]:
        """The documents' names, in order."""
        return (group.name for group in self.groups)

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """Read the wanted documents, one at a time."""
        for group in self.groups:
            if wanted(group.name):
                texts = [self._read_text(file) for file in group.files]
                yield Document(group.name, _join(texts))

    def fingerprint(self) -> str:
        """Hash of the documents' names and the raw bytes of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for group in self.groups:
            digest.update(f"document {group.name}\n".encode("utf-8", "surrogateescape"))
            for file in group.files:
                digest.update(f"file {file.name}\n".encode("utf-8", "surrogateescape"))
                digest.update(hash_file(file, self.origin))
        return digest.hexdigest()

    def report(self) -> list[str]:
        """Lines about binary files and replaced bytes, as far as documents were read."""
        lines = []
        if self.binary:
            lines.append(f"{self.origin.value}: {self.binary} files left out, they look binary")
        if self.replaced:
            lines.append(
                f"{self.origin.value}: bytes that are not UTF-8 replaced by U+FFFD in "
                f"{len(self.replaced)} files, e.g. {min(self.replaced)}"
            )
        return lines

    def _is_binary(self, file: Path) -> bool:
        return b"\0" in self._read(file, SNIFF_BYTES)

    def _read(self, file: Path, size: int = -1) -> bytes:
        try:
            with OPENERS.get(file.suffix.lower(), open)(file, "rb") as stream:
                return stream.read(size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise self.origin.error(
                f"cannot read {file} ({first_line(error)}); mend the file or leave it out"
            ) from error

    def _read_text(self, file: Path) -> str:
        raw = self._read(file)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.replaced.add(file)
            return raw.decode("utf-8-sig", errors="replace")


def hash_file(file: Path, origin: Origin) -> bytes:
    """Hash of a file's raw bytes, read in chunks."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise origin.error(f"cannot read {file} ({first_line(error)})") from error
    return digest.digest()


def _join(texts: Sequence[str]) -> str:
    """Join files, so that the next one begins on a line of its own."""
    if len(texts) == 1:
        return texts[0]
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts if text)
