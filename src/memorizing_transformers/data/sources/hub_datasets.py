"""Datasets of the Hugging Face hub as a source, streamed."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .columns import RecordRules
from .documents import Origin, Source, first_line
from .grouped import documents_of
from .records import Records, RecordStream

PREFIX = "hub:"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC)
"""What the system says of a cache folder that `datasets` cannot use."""
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class HubName(NamedTuple):
    """``hub:owner/name``, ``hub:owner/name:config``, either with ``@revision`` behind it."""

    path: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> HubName:
        """Parse a source setting."""
        name, _, revision = source.removeprefix(PREFIX).partition("@")
        path, _, config = name.partition(":")
        return cls(path, config or None, revision or None)


class HubDataset:
    """A hub dataset's splits.

    Args:
        origin: the setting; its value begins with ``hub:``.
        rules: how records become documents.
        scratch: a folder that files of groups may be put into. Default: the system's.

    Raises:
        ConfigError: the dataset cannot be found or reached.
    """

    def __init__(self, origin: Origin, rules: RecordRules, scratch: Path | None = None) -> None:
        import datasets

        self.origin = origin
        self.rules = rules
        self.scratch = scratch
        self.name = HubName.parse(origin.value)
        path, config, revision = self.name
        if not path:
            raise origin.error("names no dataset; write hub:owner/name")
        try:
            self.hash = datasets.load_dataset_builder(path, config, revision=revision).hash
            self.streams: Mapping[str, Iterable[Mapping[str, Any]]] = datasets.load_dataset(
                path, config, revision=revision, streaming=True
            )
        except Exception as error:
            # Missing, gated, of another config, or no network: `datasets` says which.
            remedy = "check the name, the network and, for a gated dataset, `hf auth login`"
            if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
                remedy = "set HF_HOME to a folder that can be written"
            raise origin.error(f"cannot be opened ({first_line(error)}); {remedy}") from error

    def split(self, role: str) -> Source | None:
        """The split for this role (``train``, ``validation``, ``test``), None if there is none."""
        name = next((name for name in SPLIT_NAMES[role] if name in self.streams), None)
        if name is None:
            return None
        stream = self.streams[name]
        place = f"{self.name.path}/{name}"
        content = self._content(name)
        records = RecordStream(place, lambda: stream, lambda: content, place=content)
        return documents_of(Records([records], self.rules, self.origin), self.scratch)

    def require(self, *roles: str) -> Source:
        """The split for the first of these roles that is there.

        Raises:
            ConfigError: there is none.
        """
        for role in roles:
            records = self.split(role)
            if records is not None:
                return records
        raise self.origin.error(
            f"has no split for {roles[0]}, only {', '.join(map(str, self.streams))}; choose a "
            "dataset with a split named train"
        )

    def _content(self, split: str) -> str:
        key = f"{PREFIX}{self.name.path}\n{self.name.config}\n{self.hash}\n{split}"
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
