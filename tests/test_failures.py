"""What a command says when it cannot go on."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.failures import DEBUG_VARIABLE, describe, fail, run, take_debug_flag
from memorizing_transformers.messages import shorten


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(DEBUG_VARIABLE, "")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def ended(work: Callable[[], object], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """The exit code and what was said."""
    with pytest.raises(SystemExit) as stop:
        run(work)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


ERRORS = [
    UserError("a line\nand another"),
    ConfigError("model.d_model", 3, "must be even"),
    MisconfigurationException("no such thing"),
    ValueError("bad\n\n value"),
    TypeError(),
    KeyError("key"),
    AttributeError("no x"),
    AssertionError(),
    RecursionError("too deep"),
    OSError(errno.ENOSPC, "No space left on device", "runs/x"),
    PermissionError(errno.EACCES, "Permission denied", b"caf\xe9"),
    ModuleNotFoundError("No module named 'psutil'", name="psutil"),
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB. And more."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    Exception("a bare one"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_is_told_in_one_line(error: Exception, capsys: pytest.CaptureFixture) -> None:
    code, said = ended(raising(error), capsys)
    assert code == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert len(said) > len("error: \n") + 3


def test_what_would_do_is_said_with_it() -> None:
    full = describe(OSError(errno.ENOSPC, "No space left on device", "runs/x"))[0]
    assert full.startswith("runs/x: No space left on device; make room")
    missing = describe(ModuleNotFoundError("No module named 'psutil.x'", name="psutil.x"))[0]
    assert "pip install psutil;" in missing
    hinted = describe(ModuleNotFoundError("try `pip install -U psutil`", name="psutil"))[0]
    assert hinted.count("pip install") == 1
    assert "data.batch_rows" in describe(MemoryError())[0]
    assert describe(ValueError("plain words"))[0].startswith("plain words; --debug")
    assert describe(KeyError("x"))[0].startswith("KeyError: 'x'; --debug")
    assert describe(UserError("no more to say"))[0] == "no more to say"


def test_the_users_mistake_behind_other_errors_is_told() -> None:
    def teardown(first: Exception, second: Exception, cause: bool) -> Exception:
        try:
            try:
                raise first
            except Exception as error:
                if cause:
                    second.__cause__ = error
                raise second  # noqa: B904
        except Exception as error:
            return error

    for cause in (True, False):
        assert describe(teardown(UserError("mine"), KeyError("x"), cause)) == ("mine", 2)
        assert describe(teardown(KeyError("x"), UserError("mine"), cause)) == ("mine", 2)
        assert "later" in describe(teardown(KeyError("x"), ValueError("later"), cause))[0]


def test_what_failed_first_is_told_and_not_what_the_end_made_of_it() -> None:
    def _teardown() -> None:
        raise AttributeError("half made")

    def fit() -> None:
        try:
            raise ValueError("the reason")
        except ValueError:
            _teardown()

    with pytest.raises(AttributeError) as caught:
        fit()
    assert describe(caught.value)[0].startswith("the reason")


def test_success_and_exits_pass() -> None:
    run(lambda: 3)
    for code in (0, 1, 130):
        with pytest.raises(SystemExit) as stop:
            run(lambda code=code: sys.exit(code))  # type: ignore[misc]
        assert stop.value.code == code


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture) -> None:
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "stopped\n")


def test_a_reader_that_left_is_no_error(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit):
            run(raising(BrokenPipeError()))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", ["1", "yes"])
def test_debugging_shows_the_traceback_above_the_line(
    value: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Traceback" not in ended(raising(KeyError("x")), capsys)[1]
    monkeypatch.setenv(DEBUG_VARIABLE, value)
    code, said = ended(raising(KeyError("x")), capsys)
    assert code == 2
    assert said.startswith("Traceback")
    assert "in work" in said
    assert said.splitlines()[-1].startswith("error: KeyError")
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    assert "Traceback" not in ended(raising(KeyError("x")), capsys)[1]


@pytest.mark.parametrize(
    "arguments", [["--debug", "fit", "--a=1"], ["fit", "--debug", "--a=1"], ["fit", "--a=1"]]
)
def test_the_debug_flag_is_taken_out_and_handed_down(arguments: list[str]) -> None:
    given = [*arguments]
    take_debug_flag(given)
    assert given == ["fit", "--a=1"]
    assert (os.environ[DEBUG_VARIABLE] == "1") == ("--debug" in arguments)


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_one_process_of_a_machine_speaks_and_all_fail(
    variable: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for rank in range(3):
        monkeypatch.setenv(variable, str(rank))
        code, line = ended(raising(UserError("mine")), capsys)
        assert code == 2
        said.append(line)
    assert said == ["error: mine\n", "", ""]


def in_a_loop(error: Exception) -> Callable[[], None]:
    """Work that fails within Lightning's loop over batches."""
    names: dict[str, Any] = {"__name__": "lightning.pytorch.loops.fit_loop", "error": error}
    exec("def advance():\n    raise error", names)
    work: Callable[[], None] = names["advance"]
    return work


def test_after_the_first_batch_every_rank_speaks_with_its_number(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "; --debug shows where\n"
    assert ended(in_a_loop(KeyError(1)), capsys) == (1, f"error: KeyError: 1{shown}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(in_a_loop(KeyError(1)), capsys) == (1, f"error: rank 1: KeyError: 1{shown}")
    monkeypatch.setenv("RANK", "9")
    assert ended(in_a_loop(UserError("mine")), capsys) == (2, "error: rank 9: mine\n")
    assert ended(in_a_loop(MemoryError()), capsys)[0] == 2
    full = OSError(errno.ENOSPC, "No space left on device")
    assert ended(in_a_loop(full), capsys)[0] == 2
    assert ended(in_a_loop(ConnectionResetError("gone")), capsys)[0] == 1


def test_complaints_of_what_is_half_made_are_not_heard(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Half:
        def __init__(self) -> None:
            raise ValueError("cannot be made")

        def __del__(self) -> None:
            raise AttributeError("has not been made")

    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    code, said = ended(Half, capsys)
    gc.collect()
    assert (code, len(said.splitlines())) == (2, 1)
    assert not heard
    assert sys.unraisablehook == heard.append


def test_the_line_is_given_as_it_is(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        fail("so it is", code=1)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: so it is\n"


UNION = """Parser key "trainer.x":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, typing.Literal['a', 'b'], <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['a', 'b']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: many"""
CLASS = """Parser key "trainer.x":
  - Expected a path but [{}] either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Errors:
    - Not a valid subclass of Callback
      Subclass types expect one of:
      - a class path (str)
    - Problem with given class_path 'a.B':
        No module named 'a'
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [{'class_path': 'a.B'}]"""


@pytest.mark.parametrize(
    ("message", "short"),
    [
        (UNION, "trainer.x = many: must be int, 'a', 'b', null"),
        (
            CLASS,
            "trainer.x = [{'class_path': 'a.B'}]: Problem with given class_path 'a.B': "
            "No module named 'a'",
        ),
        (
            CLASS.replace("Problem with given", "Import path of"),
            "trainer.x = [{'class_path': 'a.B'}]: must be a subclass of Callback, null",
        ),
        ("two\n  lines", "two lines"),
        ('Parser key "a.b":\n  not so', "a.b: not so"),
        ("Parser key \"a\": Expected a <class 'int'>. Got value: x", "a = x: must be int"),
        (UNION.replace("many", "m" * 200), f"trainer.x = {'m' * 60}…: must be int, 'a', 'b', null"),
    ],
)
def test_long_messages_keep_key_value_and_what_would_do(message: str, short: str) -> None:
    assert shorten(message) == short


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(encoding: str) -> None:
    code = (
        "import memorizing_transformers.failures as f; f.run(lambda: print('caf\\u00e9 \\u6f22'))"
    )
    source = str(Path(__file__).parents[1] / "src")
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": source},
        capture_output=True,
        check=True,
    ).stdout.decode(encoding)
    assert shown.startswith("caf")
    assert "\\u6f22" in shown
