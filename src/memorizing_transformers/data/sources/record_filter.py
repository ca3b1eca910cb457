"""A filter of records by the values of columns, which says what it left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError
from .columns import MISSING, Column, Record, RecordRules
from .documents import Origin

SHOWN_VALUES = 5


class RecordFilter:
    """The filter of one reading: what it left out, and what it met.

    Args:
        rules: the accepted values, by column.
        origin: the setting that names the source.
    """

    def __init__(self, rules: RecordRules, origin: Origin) -> None:
        self.rules = rules
        self.origin = origin
        self.read = 0
        self.left_out = 0
        self.met: dict[str, list[Any]] = {name: [] for name in rules.accepted}
        """Some values of each column."""

    def keeps(self, record: Record) -> bool:
        """Whether to keep the record; counts it."""
        if not self.met:
            return True
        self.read += 1
        for name, values in self.met.items():
            value = Column(name).value(record)
            if value is not MISSING and value not in values and len(values) < SHOWN_VALUES:
                values.append(value)
        keeps = self.rules.keeps(record)
        self.left_out += not keeps
        return keeps

    def refuse_nothing_kept(self) -> None:
        """Refuse a filter that names a column which is nowhere, or that left out all records.

        Raises:
            ConfigError: naming the column, or values that it has.
        """
        if not self.read:
            return
        unknown = [name for name, values in self.met.items() if not values]
        if unknown:
            what = f"{self.origin.value} has no column {unknown[0]!r}; name another column"
        elif self.left_out == self.read:
            held = ", ".join(f"{name} holds {_shown(values)}" for name, values in self.met.items())
            what = f"keeps no record of {self.origin.value}; {held}"
        else:
            return
        raise ConfigError("data.where", dict(self.rules.where), what)

    def lines(self) -> list[str]:
        """A line about the records that were left out."""
        if not self.left_out:
            return []
        count = f"{self.left_out:,} of {self.read:,} records"
        return [f"{self.origin.value}: {count} left out by data.where"]


def _shown(values: Sequence[Any]) -> str:
    more = ", …" if len(values) == SHOWN_VALUES else ""
    return ", ".join(f"{value!r:.60}" for value in values) + more
