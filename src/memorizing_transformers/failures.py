"""The one line that a command prints when it fails, for an error of any library.

Exit code 2 means that an input cannot work: a setting, a file, a package, or the machine's memory
or disk. Exit code 1 means that the program failed after its first batch. ``--debug``, or the
environment variable ``MEMORIZING_DEBUG``, prints the traceback above the line.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from .errors import UserError
from .messages import one_line, setting_of, shorten

DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "MEMORIZING_DEBUG"
SHOWS = f"{DEBUG_FLAG} shows where"
HELP = f"{DEBUG_FLAG}, or {DEBUG_VARIABLE}=1, shows the traceback of an error"

GIVEN, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: an input that cannot work, a failure of the program, Ctrl-C."""

KEYS = {
    "Callback": "trainer.callbacks",
    "Logger": "trainer.logger",
    "Profiler": "trainer.profiler",
    "Strategy": "trainer.strategy",
    "Accelerator": "trainer.accelerator",
    "Precision": "trainer.precision",
    "Trainer": "trainer",
    "LightningDataModule": "data",
    "LightningModule": "model",
}
"""By the name of one of Lightning's base classes, the key that sets its objects."""

EXTRAS = ("Callback", "Logger", "Profiler")
"""Base classes whose objects run during training and are set by the user."""

BATCHES = ("advance", "_evaluation_step", "_predict_step")
"""Functions of Lightning's loops that run once the first batch is read."""

DISK = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EACCES: "give a place that you may use",
    errno.EPERM: "give a place that you may use",
    errno.EROFS: "give a place that you may use",
    errno.ENOENT: "give one that exists",
    errno.ENOTDIR: "give a folder",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give another name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""The remedy if a file or folder cannot be used."""

ROOM = (
    "lower data.batch_rows, data.segment_length or model.memory.size, or set "
    "model.memory.device=cpu; `python -m memorizing_transformers estimate` says what a run needs"
)


def _frames(error: BaseException) -> list[FrameType]:
    """The frames through which an error passed, the innermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _library_base(kind: type) -> str | None:
    """The name of the base class in ``KEYS`` of which a class is a subclass."""
    ours = (base.__name__ for base in kind.__mro__ if base.__module__.startswith("lightning."))
    return next((name for name in ours if name in KEYS), None)


def _batches_began(error: BaseException) -> bool:
    """Whether the error came while batches were read, trained on or evaluated."""
    return any(
        frame.f_code.co_name in BATCHES and _module(frame).startswith("lightning.pytorch.loops")
        for frame in _frames(error)
    )


def _came_from(error: BaseException) -> Any | None:
    """The innermost object of one of Lightning's base classes on the error's way, or None."""
    for frame in _frames(error):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__getattr__":
            continue  # the caller asked for a missing attribute
        if owner is not None and _library_base(type(owner)) is not None:
            return owner
    return None


def _is_given(error: BaseException) -> bool:
    """Whether the type of an error says that an input of the user is wrong."""
    return isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and the errors that caused it."""
    chain = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) and behind not in chain:
        chain.append(behind)
    return chain


def _root(error: BaseException) -> BaseException:
    """The error to report: the wrong input that caused others, or the one before a cleanup."""
    chain = _chain(error)
    for one in chain:
        if _is_given(one):
            return one
    for one in chain:
        names = {frame.f_code.co_name for frame in _frames(one)}
        if one is chain[-1] or not names & {"_interrupt", "_teardown"}:
            return one
    return error


def _plain(error: BaseException) -> tuple[str, bool]:
    """The text of an error, and whether it is clear without the error's type."""
    text = shorten(str(error))
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        install = f"; pip install -r requirements.txt, or pip install {package}"
        return text + install * (package != "" and "pip install" not in text), True
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return f"out of memory ({text.partition('. ')[0] or 'on the host'}): {ROOM}", True
    if isinstance(error, OSError) and error.errno in DISK:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror}; {DISK[error.errno]}", True
    return text, bool(text) and type(error) in (ValueError, RuntimeError)


def describe(error: BaseException) -> tuple[str, int]:
    """The line for an error, and the exit code.

    Args:
        error: as caught; its traceback shows where it came from.
    """
    error = _root(error)
    if isinstance(error, UserError):
        return one_line(str(error)), GIVEN
    words, complete = _plain(error)
    given = complete and not isinstance(error, ValueError | RuntimeError)
    began, owner = _batches_began(error), _came_from(error)
    key = "" if began else setting_of(_frames(error))
    if not key and owner is not None:
        base, kind = _library_base(type(owner)) or "", type(owner)
        named = kind.__module__.startswith("lightning.") and base not in ("Trainer",)
        of_library = named and base in EXTRAS
        given |= of_library
        if of_library or not began:
            key = f"{KEYS[base]}: {kind.__name__}: " if named else f"{KEYS[base]}: "
    if _is_given(error):
        return (words if KEYS["Trainer"] + "." in words else key + words), GIVEN
    if not complete:
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"{key}{words}; {SHOWS}", GIVEN if given or not began else FAILED


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def take_debug_flag(arguments: list[str]) -> None:
    """Remove ``--debug`` from a command line and set it for this process and those it starts."""
    if DEBUG_FLAG in arguments:
        arguments[:] = [argument for argument in arguments if argument != DEBUG_FLAG]
        os.environ[DEBUG_VARIABLE] = "1"


def _first_of_node() -> bool:
    """Whether this process is the first, or the only one, of a run on this machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def fail(line: str, error: BaseException | None = None, code: int = GIVEN) -> NoReturn:
    """Print one line and exit.

    Before the first batch only one process of each machine prints it.

    Args:
        line: the line.
        error: the error that was caught, for its traceback.
        code: the exit code.
    """
    if error is not None and _debugging():
        traceback.print_exception(error)
    if error is not None and _batches_began(error) and not _first_of_node():
        line = f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK'))}: {line}"
    elif not _first_of_node():
        sys.exit(code)
    # File names may hold bytes that are not text.
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _release(error: BaseException) -> None:
    """Free what a failed start has left incomplete, without the messages of its destructors."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for one in _chain(error):
        one.__traceback__ = None
    gc.collect()
    sys.unraisablehook = hook


def run(work: Callable[[], object]) -> None:
    """Run a command; if it fails, end the process with one line."""
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that the terminal's encoding lacks, e.g. in a file name.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        work()
    except KeyboardInterrupt as error:
        if _debugging():
            traceback.print_exception(error)
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has closed it; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        line, code = describe(error)
        try:
            fail(line, error, code)
        finally:
            _release(error)
