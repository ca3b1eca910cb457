"""What is derived from memories and made again where it is missing."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from .ring import Memory

Made = TypeVar("Made")


class Derived(WeakKeyDictionary[Memory, Made]):
    """What was made of each memory, for as long as that memory lives.

    A copy made by pickle or deepcopy is empty: the memories are not copied with it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[Made]:
        return type(self)()
