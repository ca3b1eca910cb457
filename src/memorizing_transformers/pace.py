"""How often to print progress if there is no terminal for a progress bar."""

from __future__ import annotations

import time
from datetime import timedelta

SECONDS = 30.0
"""Seconds between two lines."""


class Pace:
    """Tells when the next line is due.

    Args:
        seconds: seconds between two lines.
        at_once: the first line is due at once. If false, after ``seconds``.
    """

    def __init__(self, seconds: float = SECONDS, at_once: bool = False) -> None:
        self.seconds = seconds
        self._next = time.monotonic() + (0.0 if at_once else seconds)

    def due(self) -> bool:
        """Whether a line is due now; if so, the next is due later."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.seconds
        return True


def duration(seconds: float) -> str:
    """A duration in days, hours, minutes and seconds, e.g. ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(seconds)))
