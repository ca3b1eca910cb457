"""``python -m memorizing_transformers COMMAND``.

Commands are functions: those below, and those of other packages, which name them as entry points of
the group ``memorizing_transformers.commands``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from inspect import formatannotation, signature
from pathlib import Path

from docstring_parser import parse as docstring

from .commands.generate import generate
from .commands.remember import remember
from .errors import ConfigError
from .failures import run, take_debug_flag
from .parsing import OneLineParser


def prepare(config: list[str]) -> None:
    """Tokenise the data of a training config ahead of a run.

    Example: python -m memorizing_transformers prepare --config configs/quickstart.yaml

    Args:
        config: training configs; a key of a later one overrides.
    """
    from .training.cli import read_config

    data = read_config(config).datamodule
    data.prepare_data()
    data.setup()
    print("\n".join(data.summary()))


def estimate(config: list[str]) -> None:
    """Print the cost of a run: bytes on device and host, FLOPs per step, bytes of a checkpoint.

    The numbers are computed for a step with a full memory, over all ranks; nothing is run. The
    device is that of trainer.accelerator; auto is a GPU if this machine has one.

    Example: python -m memorizing_transformers estimate --config configs/quickstart.yaml

    Args:
        config: training configs; a key of a later one overrides.
    """
    from .training.cli import read_config
    from .training.estimate import device_type
    from .training.estimate import estimate as cost

    cli = read_config(config)
    data, module = cli.datamodule, cli.model
    if module.base is not None:
        remedy = "estimate knows the costs of our own models only; leave it out"
        raise ConfigError("model.base", module.base, remedy)
    vocab_size = module.config.vocab_size or data.expected_vocab_size
    lines = cost(
        module.config,
        data.batch_rows,
        data.segment_length,
        vocab_size,
        module.optimizer_config.name,
        device=device_type(cli.accelerator),
    ).lines()
    print("\n".join(lines))


def export(ckpt_path: str, out: str) -> None:
    """Write a checkpoint's model as safetensors, with its configuration and tokenizer.

    Read it back with MemorizingTransformer.from_pretrained(out). Of a pretrained model with a
    memory only what was trained is written: read it back with MemorizedModel.from_pretrained(out).

    Example: python -m memorizing_transformers export --ckpt_path last.ckpt --out model/

    Args:
        ckpt_path: the checkpoint.
        out: the folder to write.
    """
    from .training.checkpoint.export import load_model

    load_model(ckpt_path).save_pretrained(out)
    print(f"model: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "estimate": estimate,
    "export": export,
    "remember": remember,
    "generate": generate,
}


GROUP = "memorizing_transformers.commands"


def all_commands() -> dict[str, Callable[..., None]]:
    """The commands of this package and of those that extend it, by name."""
    found = dict(COMMANDS)
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = point.load()
        except ModuleNotFoundError as error:
            # The entry point of a deleted package may remain; a missing dependency is an error.
            if error.name not in (point.module, point.module.partition(".")[0]):
                raise
    source = Path(__file__).parents[1]
    if source.name == "src":  # a clone, which need not be installed
        for file in sorted(source.glob("*/commands.py")):
            found |= import_module(f"{file.parent.name}.commands").COMMANDS
    return found


def _plain_options(parser: OneLineParser, command: Callable[..., None]) -> list[str]:
    """Add a command's lists and switches, which need no brackets and no true; their names."""
    words = {p.arg_name: p.description for p in docstring(command.__doc__ or "").params}
    added = []
    for name, parameter in signature(command).parameters.items():
        # Not evaluated: an extension may import what it names for type checkers only.
        kind = parameter.annotation
        kind = kind if isinstance(kind, str) else formatannotation(kind)
        if kind == "list[str] | None":
            parser.add_argument(f"--{name}", nargs="+", type=str, help=words.get(name))
        elif kind == "bool" and parameter.default is False:
            parser.add_argument(f"--{name}", action="store_true", help=words.get(name))
        else:
            continue
        added.append(name)
    return added


def _run_command() -> None:
    commands = all_commands()
    parser = OneLineParser(prog="python -m memorizing_transformers")
    subcommands = parser.add_subcommands()
    for name, command in commands.items():
        description = (command.__doc__ or "").split("Args:")[0].strip()
        subparser = OneLineParser(description=description)
        repeated = {"config"} & {*signature(command).parameters}
        for key in repeated:
            words = "a training config; may be repeated, a key of a later one overrides"
            subparser.add_argument(f"--{key}", action="append", required=True, help=words)
        own = _plain_options(subparser, command)
        subparser.add_function_arguments(command, as_group=False, skip={*repeated, *own})
        subcommands.add_subcommand(name, subparser, help=description.splitlines()[0])
    config = parser.parse_args()
    commands[config.subcommand](**config[config.subcommand].as_dict())


def main() -> None:
    """Run a command; any error ends it with one line."""
    take_debug_flag(sys.argv)
    run(_run_command)


if __name__ == "__main__":
    main()
