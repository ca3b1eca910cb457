"""Errors that a user can correct. Entry points print them as one line and exit with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: one sentence that says what is wrong and how to correct it."""


class ConfigError(UserError):
    """A setting that cannot work.

    Args:
        key: the full name of the setting, e.g. ``model.memory.top_k``.
        value: its value.
        remedy: what to give instead, e.g. ``must be at most model.memory.size (32)``.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key} = {value!r}: {remedy}")
        self.key = key
        self.value = value
