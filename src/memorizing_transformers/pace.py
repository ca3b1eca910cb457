"""How often to say how far something is, where there is no terminal to draw a bar on."""

from __future__ import annotations

import time
from datetime import timedelta

SECONDS = 30.0
"""Between two lines in a log file."""


class Pace:
    """Tells when the next line is due.

    Args:
        seconds: between two lines.
        at_once: whether the first is due at the first question, or after as many seconds.
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
    """A time in hours, minutes and seconds, e.g. ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(seconds)))
