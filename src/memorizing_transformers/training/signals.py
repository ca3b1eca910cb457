"""SIGTERM and SIGINT end a run between two steps, where its state can be saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

ENDING = (signal.SIGTERM, signal.SIGINT)

WITHIN_STEP = "stopped within a step; resume with --ckpt_path last, if there is a checkpoint"


class Interrupted(SIGTERMException):
    """The end of a run by a signal; as a ``SystemExit`` it leaves with 128 and the signal's number.

    Args:
        number: the signal.
        line: what to tell the user; RunEnd fills it where a run has taken steps.
    """

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name
        self.line = line

    def __str__(self) -> str:
        return self.line or f"stopped by {self.name} before the first step; nothing is lost"


class StopSignals:
    """Notes a signal while steps run, so that the run ends behind the step; else ends it at once.

    A second SIGINT does not wait for the end of the step: then nothing is saved. Once the run is
    ending, signals are ignored, so that saving is not disturbed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stepping = False
        """Whether somebody looks at ``received`` soon."""
        self.ending = False

    def _handle(self, number: int, frame: Any) -> None:
        if self.ending:
            return
        if self.stepping and self.received is None:
            self.received = number
        elif not self.stepping or number == signal.SIGINT:
            self.ending = True
            raise Interrupted(number, WITHIN_STEP if self.stepping else "")

    def install(self) -> None:
        """Take the signals, also from Lightning, which takes SIGTERM when a stage begins."""
        # Only the main thread may.
        with contextlib.suppress(ValueError):
            for number in ENDING:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals, and give them back."""
        before = {number: signal.getsignal(number) for number in ENDING}
        self.received, self.stepping, self.ending = None, False, False
        self.install()
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                for number, handler in before.items():
                    signal.signal(number, handler)
