"""A rank that died or hangs ends the run with a line that names it.

Every rank counts up in a store of rank 0's and watches the counts of the others, in threads of its
own. So no rank waits in a collective for one that will never come, and a rank that is only slow
ends nothing. What the libraries do without this is in docs/resume.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import TCPStore

from .checkpoint.background import Writer

INTERVAL = 0.5
"""Seconds between two beats."""
GRACE = 5.0
"""Seconds for a rank to prove that it lives, or to leave after the others, before it is called
dead."""
LAST_WORDS = 1.0
"""Seconds for this rank to end by itself, after one that it started ended with an error."""
FINISHED = -(2**40)
"""Added to the count of a rank that needs watching no more; no count makes up for it."""


class Liveness(Callback):
    """Ends this process where another rank is gone.

    A rank is gone if its process ended with an error (known at once to the rank that launched it,
    and to the others when a collective fails), or if it was silent for ``timeout``.

    Args:
        timeout: seconds of silence that are not yet death.
    """

    def __init__(self, timeout: float = 45.0) -> None:
        self.timeout = timeout
        self._store: TCPStore | None = None
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._leaving = False
        """Whether an exception of this rank's own ends it, which says so itself."""
        self._rank = 0
        self._children: list[subprocess.Popen[Any]] = []
        self._parent = (-1, -1)
        """Rank and process id of the rank that started this one, if one did."""
        self._last_beat: dict[int, float] = {}
        """By rank, when its count was last seen to move; infinity once it has finished."""

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
        self._find_parent(trainer.global_rank - trainer.local_rank)
        self._last_beat = dict.fromkeys(range(trainer.world_size), time.monotonic())
        self._stopping.clear()
        self._leaving = False
        self._threads = [
            threading.Thread(target=target, name="liveness", daemon=True)
            for target in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        if not self._children:
            self._children = list(getattr(strategy.launcher, "procs", []))
            for rank, child in enumerate(self._children, start=self._rank + 1):
                # Lives as long as the child, over all stages of a run.
                watch = threading.Thread(target=self._watch_child, args=(rank, child), daemon=True)
                watch.start()

    def _find_parent(self, first: int) -> None:
        """See whether the first rank of this machine started this process."""
        assert self._store is not None
        self._store.set(f"process/{self._rank}", str(os.getpid()))
        pid = int(self._store.get(f"process/{first}"))
        self._parent = (first, pid) if pid == os.getppid() else (-1, -1)

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
        try:
            self._store.add(f"beat/{self._rank}", FINISHED)
            finished = self._store.add("finished", 1)
            while self._rank == 0 and finished < trainer.world_size and time.monotonic() < deadline:
                time.sleep(0.01)
                finished = self._store.add("finished", 0)
        except RuntimeError:
            pass  # Rank 0 has left.
        self._store = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A collective that failed: wait a moment to see which rank is gone, and name it."""
        if isinstance(exception, SystemExit):
            self._stopping.set()  # every rank ends, and none of them is a death
        if self._store is None:
            return
        if not isinstance(exception, RuntimeError):
            self._leaving = True
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
        try:
            while self._store is not None and not self._stopping.wait(INTERVAL):
                for rank in self._last_beat:
                    count = self._store.add(f"beat/{rank}", int(rank == self._rank))
                    if count != counts.get(rank):
                        moment = math.inf if count < 0 else time.monotonic()
                        counts[rank], self._last_beat[rank] = count, moment
        except RuntimeError:
            if self._last_beat[0] == math.inf:
                self._stopping.set()  # Rank 0 took its store with it when it had finished.

    def _watch(self) -> None:
        while not self._stopping.wait(INTERVAL):
            silent = self._silent(self.timeout)
            if silent and not self._stopping.is_set():
                what = f"{_ranks(silent)} gave no sign of life for {self.timeout:g} s"
                self._end(what, hanging=silent)

    def _watch_child(self, rank: int, child: subprocess.Popen[Any]) -> None:
        # To wait, not to poll: Lightning's own observer of children, which would kill this process
        # before it has named the rank, then sees the end of a child only after this thread does.
        code = child.wait()
        how = death(code)
        # What ended it may end this rank too, which then says so itself.
        patience = LAST_WORDS if code > 0 else 0.0
        if how is not None and not self._stopping.wait(self.timeout if self._leaving else patience):
            self._end(f"rank {rank} {how}")

    def _end(self, what: str, hanging: Collection[int] = ()) -> None:
        """Leave at once: the main thread may wait in a collective that nothing can interrupt."""
        print(f"error: {what}; resume with --ckpt_path last", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        rank, pid = self._parent
        if rank in hanging and os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)  # The caller waits for that process.
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
