"""The settings that decide which tokens a corpus becomes, checked as soon as they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from ..errors import ConfigError
from .sources.columns import RecordRules
from .sources.documents import readable
from .tokens.store import MIN_TOKENS
from .tokens.tokenizers import BYTES, NUM_BYTES

SPLITS = ("train", "validation", "test")
STDLIB = "stdlib"
STDLIB_MIN_CHARACTERS = 2_000
"""Shorter documents of the standard library are left out unless `min_characters` is given."""

Grouping = Literal["file", "folder", "isabelle"]


def check_unicode(key: str, value: str | None) -> None:
    """Refuse a name whose bytes are not UTF-8: logs and saved settings could not hold it.

    Raises:
        ConfigError: naming the setting.
    """
    if value is not None and readable(value) != value:
        remedy = "is not UTF-8; rename it, or give a glob with ? in place of such bytes"
        raise ConfigError(key, readable(value), remedy)


@dataclass(frozen=True)
class SourceSettings:
    """Where the text comes from; `DocumentDataModule` says what each setting means.

    Raises:
        ConfigError: a setting cannot work.
    """

    source: str = STDLIB
    validation_source: str | None = None
    test_source: str | None = None
    text_column: str = "text"
    group_column: str | None = None
    sort_column: str | None = None
    where: Mapping[str, Any] | None = None
    group: Grouping = "file"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_unicode("data.source", self.source)
        check_unicode("data.validation_source", self.validation_source)
        check_unicode("data.test_source", self.test_source)
        if self.group not in get_args(Grouping):
            raise ConfigError("data.group", self.group, "must be 'file', 'folder' or 'isabelle'")
        self._check_records()
        for key, value in self.fractions.items():
            if not 0 <= value < 1:
                raise ConfigError(f"data.{key}_fraction", value, "must be at least 0 and below 1")
        if sum(self.fractions.values()) >= 1:
            raise ConfigError(
                "data.test_fraction",
                self.test_fraction,
                f"leaves nothing to train on with data.validation_fraction "
                f"({self.validation_fraction}); their sum must be below 1",
            )

    def _check_records(self) -> None:
        """Refuse rules for records where there are none."""
        extra = self.records.extra
        if extra and self.source == STDLIB:
            remedy = "the standard library is no records; give data.source a file of records"
            raise ConfigError(*extra, remedy)
        if extra and self.group != "file" and not self.records.by_folder:
            remedy = f"is for records, but data.group = {self.group!r} reads every file as text"
            raise ConfigError(*extra, remedy)

    @cached_property
    def records(self) -> RecordRules:
        """How records become documents."""
        by_folder = self.group == "folder" and self.group_column is not None
        return RecordRules(
            self.text_column, self.group_column, self.sort_column, self.where or {}, by_folder
        )

    @property
    def fractions(self) -> dict[str, float]:
        """The share of the documents to cut off for validation and test."""
        return {"validation": self.validation_fraction, "test": self.test_fraction}


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer; `DocumentDataModule` says what each setting means.

    Raises:
        ConfigError: a setting cannot work.
    """

    tokenizer: str = BYTES
    bpe_vocab_size: int = 512
    bpe_train_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        check_unicode("data.tokenizer", self.tokenizer)
        if self.bpe_vocab_size < NUM_BYTES:
            raise ConfigError(
                "data.bpe_vocab_size", self.bpe_vocab_size, f"must be at least {NUM_BYTES}"
            )
        if self.bpe_train_bytes < 1:
            raise ConfigError("data.bpe_train_bytes", self.bpe_train_bytes, "must be at least 1")


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that decides which tokens are in the store.

    Raises:
        ConfigError: a setting cannot work.
    """

    sources: SourceSettings = field(default_factory=SourceSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    min_characters: int | None = None
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        if self.min_tokens < MIN_TOKENS:
            raise ConfigError("data.min_tokens", self.min_tokens, f"must be at least {MIN_TOKENS}")
        if self.min_characters is not None and self.min_characters < 0:
            raise ConfigError("data.min_characters", self.min_characters, "must be at least 0")

    @property
    def shortest(self) -> int:
        """Documents of fewer characters are left out."""
        if self.min_characters is not None:
            return self.min_characters
        return STDLIB_MIN_CHARACTERS if self.sources.source == STDLIB else 0
