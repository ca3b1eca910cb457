"""A rank that died or hangs ends the run with a line that names it.

Every rank counts up in a store of rank 0's and watches the counts of the others, in threads of its
own. So no rank waits in a collective for one that will never come.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import TCPStore

from .background import Writer

INTERVAL = 0.5
"""Seconds between two beats."""
GRACE = 5.0
"""Seconds for a rank to end by itself, or to prove that it lives, before it is called dead."""


class Liveness(Callback):
    """Ends this process where another rank is gone.

    A rank is gone if its process ended (known at once to the rank that launched it, and to the
    others when a collective fails), or if it was silent for ``timeout``.

    Args:
        timeout: seconds of silence that are not yet death.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._store: TCPStore | None = None
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._rank = 0
        self._children: list[Any] = []
        self._last_beat: dict[int, float] = {}
        """By rank, when its count was last seen to move."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to beat and to watch (a collective)."""
        if trainer.world_size == 1 or self._store is not None:
            return
        strategy: Any = trainer.strategy
        host, master = strategy.cluster_environment.main_address, trainer.global_rank == 0
        patience = timedelta(seconds=self.timeout)
        if master:
            self._store = TCPStore(host, 0, None, True, patience, wait_for_workers=False)
        port = strategy.broadcast(self._store.port if self._store is not None else 0)
        if not master:
            self._store = TCPStore(host, port, None, False, patience)
        self._rank = trainer.global_rank
        self._children = getattr(strategy.launcher, "procs", [])
        self._last_beat = dict.fromkeys(range(trainer.world_size), time.monotonic())
        self._stopping.clear()
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                # Lightning's own would kill this process before it has named the rank.
                thread._child_processes = []  # type: ignore[attr-defined]
        self._threads = [
            threading.Thread(target=target, name="liveness", daemon=True)
            for target in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has ended or has nothing more to write; False where that is unknown."""
        child = rank - self._rank - 1
        if 0 <= child < len(self._children) and self._children[child].poll() is not None:
            return True
        store = self._store
        with contextlib.suppress(RuntimeError):
            return store is not None and bool(store.add(f"ended/{rank}", 0))
        return False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop; rank 0 keeps the store until the others have stopped too."""
        if self._store is None:
            return
        if isinstance(writer := getattr(trainer, "writer", None), Writer):
            try:
                writer.wait()
            finally:
                self._store.add(f"ended/{self._rank}", 1)
        self._stopping.set()
        for thread in self._threads:
            thread.join(GRACE)
        deadline = time.monotonic() + GRACE
        stopped = self._store.add("stopped", 1)
        while self._rank == 0 and stopped < trainer.world_size and time.monotonic() < deadline:
            time.sleep(0.01)
            stopped = self._store.add("stopped", 0)
        self._store = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A collective that failed: wait a moment to see which rank is gone, and name it."""
        if isinstance(exception, SystemExit):
            self._stopping.set()  # every rank ends, and none of them is a death
        if self._store is None or not isinstance(exception, RuntimeError):
            return
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(INTERVAL)
            silent = self._silent(4 * INTERVAL)
            if silent:
                self._end(f"{_ranks(silent)} ended or cannot be reached")

    def _silent(self, seconds: float) -> list[int]:
        """The ranks whose counts do not move; rank 0 where its store does not answer."""
        now = time.monotonic()
        silent = [rank for rank, beat in self._last_beat.items() if now - beat > seconds]
        return [0] if self._rank in silent else silent

    def _beat(self) -> None:
        """Count, and read the counts of the others; blocked or ended where the store is gone."""
        counts: dict[int, int] = {}
        with contextlib.suppress(RuntimeError):
            while self._store is not None and not self._stopping.wait(INTERVAL):
                for rank in self._last_beat:
                    count = self._store.add(f"beat/{rank}", int(rank == self._rank))
                    if count != counts.get(rank):
                        counts[rank], self._last_beat[rank] = count, time.monotonic()

    def _watch(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._look_at_children()
            silent = self._silent(self.timeout)
            if silent and not self._stopping.is_set():
                self._end(f"{_ranks(silent)} gave no sign of life for {self.timeout:g} s")

    def _look_at_children(self) -> None:
        for number, child in enumerate(self._children, start=1):
            code = child.poll()
            how = death(code)
            # What ended a child by itself may end this rank too, which then says so.
            if how is None or (code > 0 and self._stopping.wait(GRACE / 2)):
                continue
            self._end(f"rank {self._rank + number} {how}")

    def _end(self, what: str) -> NoReturn:
        """Leave at once: the main thread may wait in a collective that nothing can interrupt."""
        print(f"error: {what}; resume with --ckpt_path last", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        os._exit(1)


def death(code: int | None) -> str | None:
    """How a process died, by its exit code (None while it lives); None where it did not."""
    if not code:
        return None
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}; its own message says why"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
