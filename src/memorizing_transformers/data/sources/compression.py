"""Compressed files, by the last suffix of their names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast


def _open_zst(file: Path, mode: str) -> IO[bytes]:
    # Unlike the package zstandard, Arrow notices a file that was cut off, and reads all its frames.
    import pyarrow

    stream = pyarrow.input_stream(open(file, mode), compression="zstd")  # noqa: SIM115
    return io.BufferedReader(stream)


OPENERS: dict[str, Callable[[Path, str], IO[bytes]]] = {
    ".gz": cast("Callable[[Path, str], IO[bytes]]", gzip.open),
    ".bz2": cast("Callable[[Path, str], IO[bytes]]", bz2.open),
    ".xz": cast("Callable[[Path, str], IO[bytes]]", lzma.open),
    ".zst": _open_zst,
}


def open_bytes(file: Path) -> IO[bytes]:
    """A file's content, unpacked if its name says that it is compressed.

    A file of no bytes is empty, whatever its name.

    Raises:
        OSError, EOFError, ValueError, lzma.LZMAError, zlib.error: here or while reading, where the
            file cannot be read, is cut off or is no such archive.
    """
    opener = OPENERS.get(file.suffix.lower())
    if opener is None:
        return open(file, "rb")
    if file.stat().st_size == 0:
        return io.BytesIO()
    return opener(file, "rb")


def kind_of(file: Path) -> str:
    """The suffix that says what is in the file, in lower case; empty if there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
