"""Who owns a folder: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError

_held: dict[Path, FileLock] = {}
"""The locks of this process, by their files."""


def lock_file(folder: Path) -> Path:
    """Where the lock of a folder is: hidden, next to it, so that the folder holds only results."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def take(folder: Path) -> bool:
    """Own a folder until ``release``, or until this process ends.

    Args:
        folder: the folder; it need not exist, its parent is made.

    Returns:
        whether this call took it; False where this process owns it already, or where the file
        system knows no locks.

    Raises:
        UserError: where another live process owns it.
    """
    path = lock_file(folder)
    if path in _held:
        return False
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder}: another run is training there; wait for its end, or give another "
            "trainer.default_root_dir or dirpath"
        ) from error
    except (OSError, NotImplementedError):
        return False
    _held[path] = lock
    return True


def release(folder: Path) -> None:
    """Give a folder back."""
    path = lock_file(folder)
    lock = _held.pop(path, None)
    if lock is not None:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: afterwards it may be another's
        lock.release()


def is_foreign(folder: Path) -> bool:
    """Whether another live process owns a folder."""
    path = lock_file(folder)
    if path in _held or not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
