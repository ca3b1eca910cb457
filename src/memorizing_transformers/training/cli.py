"""``python train.py {fit,validate,test,predict} --config FILE [--key value]``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..data.datamodule import DocumentDataModule
from ..errors import ConfigError, UserError
from ..parsing import OneLineParser, configs_first, one_line
from .callbacks import PredictionWriter
from .logger import RunLogger, flat_settings
from .module import MemorizingLM
from .quiet import hush
from .report import final_report
from .runs import resolve_checkpoint, run_folder
from .trainer import MemoryTrainer


class Parser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved config beside a training run and tells its loggers the settings; other
    commands leave both alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the settings to the loggers; rank 0 only."""
        for logger in trainer.loggers:
            logger.log_hyperparams(flat_settings(vars(self.config.as_flat())))


def root_folder(trainer: Any) -> Path:
    """Where runs go, by the trainer's settings.

    Raises:
        ConfigError: where nothing can be written there.
    """
    key, given = "trainer.default_root_dir", trainer["default_root_dir"]
    if not given:
        raise ConfigError(key, given, "must name a folder")
    root = Path(given)
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ConfigError(key, str(given), f"cannot be written ({error.strerror})") from error
    return root


class MemoryCLI(LightningCLI):
    """LightningCLI with the project's run folders, final table and one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            MemorizingLM,
            DocumentDataModule,
            parser_class=Parser,
            trainer_class=MemoryTrainer,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"use_distributed_sampler": False, "default_root_dir": "runs/default"},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own top-level keys."""
        parser.add_argument(
            "--final_report",
            type=bool,
            default=False,
            help="after fit, test the weights with memory and with memory switched off and print "
            "a table",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Let keys win over config files in whatever order they are given."""
        if args is None or isinstance(args, list):
            given = sys.argv[1:] if args is None else args
            self.config = parser.parse_args(configs_first(given, self.subcommands()))
        else:
            super().parse_arguments(parser, args)
        options = self.config.get(self.config.get("subcommand", ""), self.config)
        seed = options["seed_everything"]
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigError("seed_everything", seed, "must lie in [0, 2**32)")

    def _parse_ckpt_path(self) -> None:
        # The stock method merges a checkpoint's hyper-parameters over the command line, so a test
        # with a larger memory would silently use the old one. What a checkpoint may not change is
        # checked when it is loaded.
        if not self.config.get("subcommand"):
            return
        options = self.config[self.config.subcommand]
        options["ckpt_path"] = resolve_checkpoint(
            options.get("ckpt_path"), root_folder(options.trainer)
        )
        if self.config.subcommand != "fit" and options["ckpt_path"] is None:
            rank_zero_warn("ckpt_path: none given, so the weights are untrained; try 'last'")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to the run's folder; a resumed run goes on in the folder of its checkpoint."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        root = root_folder(config["trainer"])
        if config["trainer"]["accumulate_grad_batches"] < 1:
            key = "trainer.accumulate_grad_batches"
            raise ConfigError(
                key, config["trainer"]["accumulate_grad_batches"], "must be 1 or more"
            )
        if self.subcommand and config["trainer"]["logger"] in (None, True):
            folder = run_folder(root, self.subcommand, config.get("ckpt_path"))
            kwargs["logger"] = RunLogger(folder.parent, name="", version=folder.name)
        try:
            return super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"trainer: {error}") from error

    trainer: Any

    def before_predict(self) -> None:
        """Write predictions to a file instead of holding them."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        self.trainer.callbacks.append(PredictionWriter(Path(folder) / "predictions.parquet"))

    def predict(self, **kwargs: Any) -> None:
        """Run prediction; nothing is kept in RAM."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def after_fit(self) -> None:
        """Print the final table."""
        if self.config.fit.final_report and not self.trainer.fast_dev_run:
            final_report(self.trainer, self.model, self.datamodule)


def read_config(path: str, arguments: Sequence[str] = ()) -> MemoryCLI:
    """A training config, its model and data built but for the network, nothing run.

    The machine that reads it need not be one that can run it.

    Args:
        path: the config.
        arguments: further ones of the command line, ``--key=value``.
    """
    here = {"accelerator": "cpu", "devices": "1", "num_nodes": "1", "strategy": "auto"}
    args = [f"--trainer.{key}={value}" for key, value in {**here, "precision": "32"}.items()]
    hush()
    return MemoryCLI(run=False, args=["--config", path, *arguments, *args])


def main() -> None:
    """Run the command line; mistakes of the user's end it with one line and exit code 2."""
    hush()
    try:
        MemoryCLI()
    except (UserError, MisconfigurationException) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
