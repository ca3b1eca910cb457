"""Which columns of records are looked at, and how: text, groups, order and a filter.

A column is named as it stands in the record, or by a path: ``meta.set`` is the field ``set`` of
``meta``, and ``files[].content`` is the field ``content`` of each item of the list ``files``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import ConfigError
from .documents import join_texts, readable

NAME_COLUMNS = ("title", "name", "id")
MISSING = object()
"""Stands for the value of a column that a record has not."""
EXACT = 2**53
"""Up to here every whole number is a number of 64 bits with a point."""
SCALARS = (str, int, float, type(None))

Record = Mapping[str, Any]


class NotText(ValueError):
    """A column holds something else than text."""


@dataclass(frozen=True)
class Column:
    """A column by its name or path.

    Args:
        name: as the user gave it.
    """

    name: str

    @property
    def is_list(self) -> bool:
        """Whether the path leads into the items of a list."""
        return "[]" in self.name

    @property
    def list_name(self) -> str:
        """The name without what follows a list."""
        return self.name.partition("[]")[0]

    @cached_property
    def list_path(self) -> tuple[str, ...]:
        """The path to the list, or to the value itself where there is no list."""
        return tuple(self.list_name.split("."))

    @cached_property
    def item_path(self) -> tuple[str, ...]:
        """The path from an item of the list to the value; empty if the item is the value."""
        return tuple(part for part in self.name.partition("[]")[2].split(".") if part)

    @property
    def tops(self) -> tuple[str, ...]:
        """The names under which a record may hold it, its own or the first of its path."""
        return self.name, self.list_path[0]

    def value(self, record: Record) -> Any:
        """The value, or the list of items; `MISSING` if the record has no such column."""
        if self.name in record:
            return record[self.name]
        return _follow(record, self.list_path)

    def check(self, key: str, lists: bool = False) -> None:
        """Refuse what is no path.

        Args:
            key: the setting that names the column.
            lists: whether the path may lead into a list.

        Raises:
            ConfigError: naming the setting.
        """
        form = "text, meta.set or files[].content" if lists else "repository or meta.set"
        _, mark, tail = self.name.partition("[]")
        parts = [*self.list_path, *tail.split(".")[1:]]
        broken = mark and (not all(parts) or tail[:1] not in ("", ".") or "[]" in tail)
        if broken or not self.name or (mark and not lists):
            raise ConfigError(key, self.name, f"names no column; write it like {form}")


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def sort_key(value: Any) -> tuple[int, float, str]:
    """A key that orders any values: numbers by size, then all others as text, then none."""
    if value is None or value is MISSING:
        return 2, 0.0, ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= EXACT:
        return 0, float(value), ""
    return 1, 0.0, readable(str(value))


@dataclass(frozen=True)
class RecordRules:
    """How records become documents; `DocumentDataModule` says what each setting means.

    Raises:
        ConfigError: a setting cannot work.
    """

    text_column: str = "text"
    group_column: str | None = None
    sort_column: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    by_folder: bool = False
    """Whether the first part of a path in the group column names the document."""

    def __post_init__(self) -> None:
        self.text.check("data.text_column", lists=True)
        if self.group is not None:
            self.group.check("data.group_column")
        if self.sort is not None:
            self.sort.check("data.sort_column", lists=True)
            self._check_sort(self.sort)
        for name, accepted in self.accepted.items():
            Column(name).check("data.where")
            if not accepted or not all(isinstance(value, SCALARS) for value in accepted):
                remedy = f"give {name} one value or a list of values: texts, numbers or booleans"
                raise ConfigError("data.where", dict(self.where), remedy)

    def _check_sort(self, sort: Column) -> None:
        if sort.is_list:
            if self.text.is_list and self.text.list_path == sort.list_path:
                return
            remedy = f"must name the same list as data.text_column ({self.text_column!r})"
        elif self.group is None:
            remedy = (
                "sorts nothing; also give data.group_column, or a path into the list of "
                "data.text_column, like files[].path"
            )
        else:
            return
        raise ConfigError("data.sort_column", sort.name, remedy)

    @cached_property
    def text(self) -> Column:
        """The column of the text."""
        return Column(self.text_column)

    @cached_property
    def group(self) -> Column | None:
        """The column whose value says which document a record belongs to."""
        return None if self.group_column is None else Column(self.group_column)

    @cached_property
    def sort(self) -> Column | None:
        """The column that orders the records of a document, or the items of a list."""
        return None if self.sort_column is None else Column(self.sort_column)

    @cached_property
    def accepted(self) -> dict[str, list[Any]]:
        """The values that a record may have, by column."""
        return {k: list(v) if isinstance(v, list) else [v] for k, v in self.where.items()}

    @cached_property
    def used(self) -> list[Column]:
        """All columns that the rules name."""
        columns = [self.text, self.group, self.sort, *map(Column, self.accepted)]
        return [column for column in columns if column is not None]

    @cached_property
    def names(self) -> list[str]:
        """The names of all columns that are looked at."""
        tops = [name for column in self.used for name in column.tops]
        return list(dict.fromkeys([*tops, *NAME_COLUMNS]))

    @property
    def extra(self) -> tuple[str, Any] | None:
        """The first setting that is for records alone, but the text column: its key and value."""
        given = {
            "data.group_column": self.group_column,
            "data.sort_column": self.sort_column,
            "data.where": dict(self.where) or None,
        }
        return next(((key, value) for key, value in given.items() if value is not None), None)

    def facts(self) -> list[Any]:
        """What decides which texts the same records become; the text column alone by default."""
        others = [self.group_column, self.sort_column, sorted(self.accepted.items())]
        others += ["by folder"] if self.by_folder else []
        return [self.text_column, *(others if any(others) else [])]

    def keeps(self, record: Record) -> bool:
        """Whether the filter keeps a record."""
        return all(
            _agrees(Column(name).value(record), accepted)
            for name, accepted in self.accepted.items()
        )

    def group_of(self, record: Record) -> str | None:
        """The name of the record's document, None if it has none."""
        assert self.group is not None
        value = self.group.value(record)
        if value is None or value is MISSING:
            return None
        name = readable(str(value))
        if self.by_folder:
            name = next((part for part in name.split("/") if part not in ("", ".")), "")
        return name or None

    def text_of(self, record: Record) -> Any:
        """The record's text, None if it is empty, `MISSING` if there is no such column.

        Raises:
            NotText: the column holds something else.
        """
        value = self.text.value(record)
        if value is None or value is MISSING:
            return value
        if not isinstance(value, list if self.text.is_list else str):
            what = "a list" if self.text.is_list else "text"
            raise NotText(
                f"column {self.text.list_name!r} holds {type(value).__name__}, not {what}"
            )
        if not self.text.is_list:
            return value
        if self.sort is not None and self.sort.is_list:
            path = self.sort.item_path
            value = sorted(value, key=lambda item: sort_key(_follow(item, path)))
        texts = [_follow(item, self.text.item_path) for item in value]
        if value and all(text is MISSING for text in texts):
            return MISSING
        texts = [text for text in texts if text is not None and text is not MISSING]
        for text in texts:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise NotText(f"column {self.text_column!r} holds {kind}, not text")
        return join_texts(texts)


def _agrees(value: Any, accepted: list[Any]) -> bool:
    """Whether the value, or one of its items if it is a list, is accepted; 1 is not True."""
    found = value if isinstance(value, list) else [None if value is MISSING else value]
    return any(
        item == other and isinstance(item, bool) == isinstance(other, bool)
        for item in found
        for other in accepted
    )
