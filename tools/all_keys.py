"""Write configs/all-keys.yaml: every key of this project, with its help and its default.

make all-keys
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from memorizing_transformers.training.cli import read_config

PATH = Path(__file__).parent.parent / "configs" / "all-keys.yaml"
HEADER = """\
# Every key of `python train.py fit` but those of Lightning's own trainer, with its default. Copy
# the keys that you change into your own config. Made by `make all-keys`; do not edit.
#   python train.py fit --config configs/all-keys.yaml --trainer.max_steps 4000
# This is no experiment, so it names no hardware, minutes or perplexity. The defaults train a model
# of four layers on the bytes of Python's standard library. Callbacks: configs/quickstart.yaml.
"""


def entries(tree: Mapping[str, Any], helps: Mapping[str, str], above: str = "") -> Iterator[str]:
    """Lines of YAML, each key below its help.

    Args:
        tree: values, in groups.
        helps: by dotted key; other keys are left out.
        above: the dotted key of the group.
    """
    indent = "  " * above.count(".")
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and any(known.startswith(f"{key}.") for known in helps):
            yield f"{indent}{name}:"
            yield from entries(value, helps, f"{key}.")
        elif key in helps:
            text = textwrap.wrap(helps[key], 98 - len(indent), break_on_hyphens=False)
            yield from (f"{indent}# {line}" for line in text)
            # After a scalar PyYAML adds a line that ends the document.
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
            yield f"{indent}{name}: {shown}"


def document() -> str:
    """The text of the file for the current parser."""
    parser = read_config(()).parser
    defaults = yaml.safe_load(parser.dump(parser.get_defaults(), skip_unset=False))
    theirs = {f"trainer.{name}" for name in signature(Trainer).parameters}
    helps = {action.dest: action.help or "" for action in parser._actions}
    own = {key: text for key, text in helps.items() if key not in theirs}
    return HEADER + "\n".join(entries(defaults, own)) + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
    print(PATH)
