"""``python train.py {fit,validate,test,predict} --config FILE [--key value]``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ..data.datamodule import DocumentDataModule
from ..errors import ConfigError
from ..failures import run, take_debug_flag
from ..memory.search.policy import has_fast_bfloat16
from ..parsing import OneLineParser, configs_first
from .callbacks import PredictionWriter, ProgressLines
from .checkpoint.finding import resolve_checkpoint, saved_to
from .ends import end_line
from .final_table import final_report
from .module import MemorizingLM
from .run_folders import run_folder
from .signals import Interrupted
from .tensorboard import RunLogger, flat_settings
from .trainer import MemoryTrainer
from .unwanted_messages import drop_unwanted_messages

LIMITED = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""By command, the split whose batches it needs."""


class Parser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved config of a training run and gives the settings to its loggers. In
    other commands it does nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: a refused start must not overwrite the config of an earlier run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config.yaml`` into the run's folder."""
        if trainer.loggers:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the settings to the loggers; rank 0 only."""
        for logger in trainer.loggers:
            logger.log_hyperparams(flat_settings(vars(self.config.as_flat())))


def root_folder(trainer: Any) -> Path:
    """Where runs go, by the trainer's settings.

    Raises:
        ConfigError: if the folder cannot be written.
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


class RunPredictions(PredictionWriter):
    """Writes predictions into the run's folder, once it is known."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the folder (a collective)."""
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / self.path.name


def draws_a_bar(trainer: Any, callbacks: list[Any]) -> bool:
    """Whether the trainer, with these settings, would add its own progress bar."""
    if trainer["enable_progress_bar"] is False or trainer["barebones"]:
        return False
    return not any(isinstance(callback, ProgressBar) for callback in callbacks)


def check_numbers(trainer: Any) -> None:
    """Refuse numbers in the trainer's settings that fail only during a step.

    Raises:
        ConfigError: naming the key.
    """
    never = "trainer.limit_val_batches=0 switches validation off"
    for key, least, remedy in (
        ("accumulate_grad_batches", 1, "must be 1 or more"),
        ("gradient_clip_val", 0, "must be above 0; leave it out to clip nothing"),
        ("val_check_interval", 1, f"must be 1 batch or more, or a share of an epoch; {never}"),
        ("check_val_every_n_epoch", 1, f"must be 1 or more; {never}"),
    ):
        value = trainer[key]
        share = key == "val_check_interval" and isinstance(value, float) and 0 < value < 1
        if isinstance(value, int | float) and not (share or value >= least):
            raise ConfigError(f"trainer.{key}", value, remedy)


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
            help="After fit, test the weights with memory and without it, and print a table.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Let keys override config files, in any order of the arguments."""
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
        # Lightning's method lets a checkpoint's hyper-parameters override the command line, so a
        # test with a larger memory would silently use the old size. Settings that must equal the
        # checkpoint's are checked when it is loaded.
        if not self.config.get("subcommand"):
            return
        options = self.config[self.config.subcommand]
        root = root_folder(options.trainer)
        given, places = options.get("ckpt_path"), saved_to(options.trainer, root)
        options["ckpt_path"] = resolve_checkpoint(given, root, self.config.subcommand, places)
        weights = options["ckpt_path"] or options.model.init_from
        if self.config.subcommand != "fit" and weights is None:
            rank_zero_warn("ckpt_path: none given, so the weights are untrained; try 'last'")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to the run's folder; a resumed run continues in the folder of its checkpoint."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        root = root_folder(config["trainer"])
        given = config["trainer"]
        check_numbers(given)
        if self.subcommand and config["trainer"]["logger"] in (None, True):
            checkpoint = config.get("ckpt_path")
            folder = run_folder(root, self.subcommand, checkpoint)
            resumes = checkpoint and folder.resolve() in Path(checkpoint).resolve().parents
            # A new run takes its number when it starts, and makes the folder with it.
            version = folder.name if resumes else None
            kwargs["logger"] = RunLogger(folder.parent, name="", version=version)
        callbacks = config["trainer"]["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if draws_a_bar(config["trainer"], callbacks) and not sys.stdout.isatty():
            kwargs["callbacks"] = [*callbacks, ProgressLines()]
        return super().instantiate_trainer(**kwargs)

    trainer: Any

    def _run_subcommand(self, subcommand: str) -> None:
        limit = f"limit_{LIMITED[subcommand]}_batches"
        if getattr(self.trainer, limit) == 0:
            rank_zero_warn(f"trainer.{limit} = 0: {subcommand} has nothing to do")
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and self.trainer.precision.startswith("bf16") and not has_fast_bfloat16():
            rank_zero_warn(
                f"trainer.precision = {self.trainer.precision}: this CPU has no instructions for "
                "bfloat16, so steps take several times as long; 32-true is faster"
            )
        super()._run_subcommand(subcommand)

    def before_predict(self) -> None:
        """Write predictions to a file instead of holding them."""
        self.trainer.callbacks.append(RunPredictions(Path("predictions.parquet")))

    def predict(self, **kwargs: Any) -> None:
        """Run prediction; nothing is kept in RAM."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def after_fit(self) -> None:
        """Print why the run ended, and the final table."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            print(end_line(self.trainer))
        if self.config.fit.final_report and not self.trainer.fast_dev_run:
            final_report(self.trainer, self.model, self.datamodule)


class ConfigReader(MemoryCLI):
    """Builds what a config describes on this machine's CPU, whatever the run will use."""

    accelerator: Any
    """What the config asks for."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Note the accelerator, which this machine may lack, and take the CPU."""
        super().parse_arguments(parser, args)
        self.accelerator = self.config["trainer"]["accelerator"]
        self.config["trainer"]["accelerator"] = "cpu"


def read_config(paths: str | Sequence[str], arguments: Sequence[str] = ()) -> ConfigReader:
    """Read a training config and build its model, without the network, and its data; run nothing.

    Another machine may be needed to run it.

    Args:
        paths: one config, or several; a key of a later one overrides.
        arguments: further arguments of the command line, ``--key=value``.
    """
    here = {"devices": "1", "num_nodes": "1", "strategy": "auto"}
    args = [f"--trainer.{key}={value}" for key, value in {**here, "precision": "32"}.items()]
    drop_unwanted_messages()
    configs = [f"--config={path}" for path in ([paths] if isinstance(paths, str) else paths)]
    return ConfigReader(run=False, args=[*configs, *arguments, *args])


def _run_command() -> None:
    try:
        MemoryCLI()
    except Interrupted as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(stop, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("stopped by SIGINT before the first step; nothing is lost", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Run the command line; any error ends it with one line."""
    drop_unwanted_messages()
    take_debug_flag(sys.argv)
    run(_run_command)
