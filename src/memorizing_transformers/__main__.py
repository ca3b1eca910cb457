"""``python -m memorizing_transformers {prepare,estimate,export,inspect}``."""

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


def inspect(
    ckpt_path: str,
    document: str,
    out: str = "report",
    memory_sizes: str | None = None,
    segment_length: int | None = None,
    retrieved: int = 4,
    device: str | None = None,
) -> None:
    """Show what the memory does for a text: one HTML page, and the same as JSON lines.

    Reads the text with the memory switched off and with it, and keeps for every token what it
    gained and what each head retrieved.

    Example: python -m memorizing_transformers inspect --ckpt_path last.ckpt --document FILE

    Args:
        ckpt_path: a checkpoint, or a folder that export wrote.
        document: a text file in UTF-8.
        out: the folder to write index.html and tokens.jsonl into.
        memory_sizes: one or two sizes of the memory, e.g. 2048,8192; the checkpoint's unless given.
        segment_length: tokens read at once; that of the training run unless given.
        retrieved: neighbours kept of each head and token, the heaviest first.
        device: e.g. cpu or cuda:0; a GPU unless given, where there is one.
    """
    from .analysis.inspect import inspect as run

    run(ckpt_path, document, out, memory_sizes, segment_length, retrieved, device)


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "estimate": estimate,
    "export": export,
    "inspect": inspect,
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
