"""Command-line parsers with one-line errors."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from itertools import islice
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from .failures import HELP, fail
from .messages import setting_of, shorten
from .repeated import refuse_repeated_keys

UNKNOWN_KEY = (
    r"[Uu]nrecognized arguments?: --([\w.]+)",
    r"does not accept (?:option|key)s? '([\w.]+)'",
    r"[Kk]ey ['\"]([\w.]+)['\"] is not expected",
    r"Option '([\w.]+)' is not accepted",
)
"""The parser's messages about an unknown key."""

_LISTED = "was removed; list {} under trainer.callbacks instead, as configs/quickstart.yaml does"
REMOVED = {
    "model.staleness_every_n_steps": _LISTED.format(
        "RetrievalLogging, StalenessLogging and StepTiming, each with every_n_steps,"
    ),
    "model.inspect_every_n_steps": _LISTED.format(
        "RetrievalHistograms and RetrievalSamples, each with every_n_steps, and LossByPosition"
    ),
}
"""By a key of an earlier version, what replaces it."""

_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    refuse_repeated_keys(text)
    return _load_yaml(text)


set_loader("yaml", _load, (yaml.YAMLError,))
# Some defaults of Lightning's callbacks are members of enumerations.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, one: dumper.represent_data(one.value))


def suggest(message: str, known: Iterable[str]) -> str:
    """The message, and for an unknown key what replaces it or the nearest known key."""
    found = [match for pattern in UNKNOWN_KEY if (match := re.search(pattern, message))]
    if not found:
        return message
    if found[0][1] in REMOVED:
        return f"{found[0][1]}: {REMOVED[found[0][1]]}"
    keys = list(known)
    near = difflib.get_close_matches(found[0][1], keys, n=1)
    return f"{message}; did you mean {near[0]}?" if near else message


def configs_first(args: Sequence[str], subcommands: Collection[str]) -> list[str]:
    """Put a subcommand's config files first, so that keys at any place override them.

    Args:
        args: the command line.
        subcommands: the names of the subcommands.
    """
    start = next((i + 1 for i, arg in enumerate(args) if arg in subcommands), 0)
    configs: list[str] = []
    others: list[str] = []
    rest = iter(args[start:])
    for arg in rest:
        if arg in ("-c", "--config"):
            configs += [arg, *islice(rest, 1)]
        elif arg.startswith("--config="):
            configs.append(arg)
        else:
            others.append(arg)
    return [*args[:start], *configs, *others]


def check_base(content: str) -> None:
    """Refuse a config that names its base (``config: FILE``) and would drop values of it.

    The parser reads the base first and then replaces values: a group of the file would drop the
    other keys of the base's group, ``+`` would drop the base's list, and keys above ``config`` are
    lost.

    Args:
        content: YAML.

    Raises:
        TypeError: naming the key and a form that works.
    """
    try:
        given = yaml.safe_load(content)
    except yaml.YAMLError:
        return  # the parser reports it
    if not isinstance(given, dict) or "config" not in given:
        return
    first, base = next(iter(given)), given.pop("config")
    if not isinstance(base, str):
        raise TypeError(f"config = {base}: must be the path of one file")
    if first != "config":
        raise TypeError(f"config = {base}: must be the first key of its file, not below {first}")
    for key, value in given.items():
        if isinstance(value, dict) and "class_path" not in value:
            inner = next(iter(value), "...")
            raise TypeError(
                f"{key}: would drop the other values of {base}; give {key}.{inner}: ..."
            )
        if key.endswith("+"):
            raise TypeError(f"{key}: cannot add to {base}; give the complete list as {key[:-1]}")


class OneLineParser(ArgumentParser):
    """Prints ``error: ...``, with the nearest key for an unknown one, and exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A prefix of a key is a mistake, not a short form.
        super().__init__(*args, allow_abbrev=False, epilog=HELP, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config, of a file or from the command line."""
        check_base(content)
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [action.dest for action in parser._actions]
        # A parser of one class only knows its own keys; its callers know the key of that class.
        callers = (caller.frame for caller in inspect.stack(0))
        fail(suggest(setting_of(callers) + shorten(message), known), ex)
