"""Writing in the background, in the order asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Runs jobs one after the other in a thread of its own; the first failure is raised later.

    Args:
        background: whether to use a thread; without it a job is done when ``submit`` returns.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, job: Callable[[], None], only_after_success: bool = False) -> None:
        """Do a job after all that were submitted before it.

        Args:
            job: the job.
            only_after_success: leave it out where a job before it has failed.

        Raises:
            Exception: what an earlier job has failed with.
        """
        if not self.background:
            job()
            return
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending.append(self._pool.submit(self._run, job, only_after_success))

    def _run(self, job: Callable[[], None], only_after_success: bool) -> None:
        if only_after_success and self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Return when every job is done.

        Raises:
            Exception: what the first job that failed has failed with; the others are done too.
        """
        failures = []
        while self._pending:
            error = self._pending.popleft().exception()
            if error is not None:
                failures.append(error)
        if failures:
            raise failures[0]
