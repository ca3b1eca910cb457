"""``python -m memorizing_transformers {prepare,estimate,export}``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .errors import UserError
from .parsing import OneLineParser, one_line


def prepare(config: str) -> None:
    """Tokenise the data of a training config ahead of a run.

    Example: python -m memorizing_transformers prepare --config configs/quickstart.yaml

    Args:
        config: the training config.
    """
    from .training.cli import read_config

    data = read_config(config).datamodule
    data.prepare_data()
    data.setup()
    print("\n".join(data.summary()))


def estimate(config: str) -> None:
    """Print what a run will cost: bytes on device and host, FLOPs a step, bytes of a checkpoint.

    A cost model of a step with a full memory, over all ranks; nothing is run.

    Example: python -m memorizing_transformers estimate --config configs/quickstart.yaml

    Args:
        config: the training config.
    """
    from .training.cli import read_config
    from .training.estimate import estimate as cost

    cli = read_config(config)
    data, module = cli.datamodule, cli.model
    vocab_size = module.config.vocab_size or data.expected_vocab_size
    lines = cost(
        module.config,
        data.batch_rows,
        data.segment_length,
        vocab_size,
        module.optimizer_config.name,
    ).lines()
    print("\n".join(lines))


def export(ckpt_path: str, out: str) -> None:
    """Write a checkpoint's model as safetensors, with its configuration and tokenizer.

    Read it back with MemorizingTransformer.from_pretrained(out).

    Example: python -m memorizing_transformers export --ckpt_path last.ckpt --out model/

    Args:
        ckpt_path: the checkpoint.
        out: the folder to write.
    """
    from .training.export import load_model

    load_model(ckpt_path).save_pretrained(out)
    print(f"model: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "estimate": estimate,
    "export": export,
}


def main() -> None:
    """Run a command; mistakes of the user's end it with one line and exit code 2."""
    parser = OneLineParser(prog="python -m memorizing_transformers")
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        description = (command.__doc__ or "").split("Args:")[0].strip()
        subparser = OneLineParser(description=description)
        subparser.add_function_arguments(command, as_group=False)
        subcommands.add_subcommand(name, subparser, help=description.splitlines()[0])
    config = parser.parse_args()
    try:
        COMMANDS[config.subcommand](**config[config.subcommand].as_dict())
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
