"""One variant with one seed: trained and evaluated, in a folder of its own.

VARIANT/seed-0/
  trial.json       the trial, and every config value of it and of its source
  version_0/       the training run
  texts.json       which texts it read
  trained.json     its checkpoint, steps, tokens and time, written when training has ended
  documents.json   loss by document
  result.json      the figures, written when everything is done
  failed.json      the reason, written if it failed
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memorizing_transformers.errors import UserError
from memorizing_transformers.messages import one_line
from memorizing_transformers.training.callbacks import RetrievalLogging, StepTiming, Throughput
from memorizing_transformers.training.cli import MemoryCLI
from memorizing_transformers.training.run_folders import resolve_checkpoint
from memorizing_transformers.training.unwanted_messages import drop_unwanted_messages

from .evaluation import Evaluation
from .json_files import read_json, write_json
from .plan import arguments
from .trial_callbacks import SameTexts, StartFrom, TrialProgress

LOCK_SECONDS = 30.0
"""How long to wait for a process whose runner was killed; it ends by itself."""


@dataclass(frozen=True)
class Trial:
    """One variant with one seed.

    Args:
        variant: the name of the variant.
        seed: the seed of initial weights and document order.
        folder: the folder of the trial.
        base: path of the base config.
        settings: config values that the variant sets over the base, without the budget.
        limits: the budget as keys of the trainer.
        train: train it; otherwise only evaluate the weights of ``source``.
        source: the folder of the trial whose weights it starts from, or None.
        split: the split to evaluate.
    """

    variant: str
    seed: int
    folder: str
    base: str
    settings: dict[str, Any]
    limits: dict[str, Any]
    train: bool
    source: str | None
    split: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def result(self) -> dict[str, Any] | None:
        """The figures, or None if it is not finished."""
        found: dict[str, Any] | None = read_json(self.path / "result.json")
        return found

    @property
    def failure(self) -> str | None:
        """Why it failed, or None if it did not fail or has finished since."""
        found = None if self.result is not None else read_json(self.path / "failed.json")
        return None if found is None else str(found["reason"])

    def fail(self, reason: str) -> None:
        """Write that it failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "failed.json", {"reason": reason})

    def save(self, asked: dict[str, Any]) -> None:
        """Write the trial to its folder.

        Args:
            asked: every value of its config and of its source's, which a later call compares.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "trial.json", {**asdict(self), "asked": asked})

    @classmethod
    def load(cls, folder: Path) -> Trial:
        """The trial that ``save`` wrote to a folder."""
        found = read_json(folder / "trial.json")
        return cls(**{field.name: found[field.name] for field in fields(cls)})


class TrialCLI(MemoryCLI):
    """The training command line with more callbacks.

    Args:
        extra: the callbacks.
        kwargs: arguments of ``MemoryCLI``.
    """

    def __init__(self, extra: list[Callback], **kwargs: Any) -> None:
        self.extra = extra
        super().__init__(**kwargs)

    def before_fit(self) -> None:
        """Add the callbacks, and those whose figures the table shows if the base lacks them."""
        present = {type(callback) for callback in self.trainer.callbacks}
        needed = [Throughput(), RetrievalLogging(), StepTiming()]
        missing = [callback for callback in needed if type(callback) not in present]
        self.trainer.callbacks.extend([*missing, *self.extra])


def curves(folder: Path) -> dict[str, float]:
    """What training logged about search: its median milliseconds per step, and its mean recall over
    the second half of the measurements."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found, recalls = {}, []
    for tag in events.Tags()["scalars"]:
        values = [event.value for event in events.Scalars(tag)]
        if tag == "time/search_ms":
            found["train_search_ms"] = statistics.median(values)
        elif tag.startswith("memory/recall/"):
            recalls += values[len(values) // 2 :]
    if recalls:
        found["train_recall"] = statistics.fmean(recalls)
    return found


def train(trial: Trial) -> dict[str, Any]:
    """Train, or resume a run that was killed.

    Returns:
        the checkpoint's path and the figures of the run, as ``trained.json`` keeps them.

    Raises:
        UserError: if training ended before its budget was used, or before its first step.
    """
    quiet = {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}
    root = {"trainer.default_root_dir": trial.folder}
    args = arguments({**trial.settings, **trial.limits, **quiet, **root})
    extra: list[Callback] = [SameTexts(trial.path), TrialProgress(trial.path)]
    try:
        last = resolve_checkpoint("last", trial.path)
    except UserError:
        last = None
    if last is not None:
        args.append(f"--ckpt_path={last}")
    elif trial.source is not None:
        extra.append(StartFrom(source_checkpoint(trial)))
    cli = TrialCLI(extra, args=["fit", "--config", trial.base, *args])
    trainer: Any = cli.trainer
    timed = "trainer.max_time" in trial.limits
    budget = 1 if timed else trial.limits["trainer.max_steps"]
    if trainer.global_step < budget:
        raise UserError(f"training ended after {trainer.global_step} steps of {budget}")
    speed = next(c for c in trainer.callbacks if isinstance(c, Throughput))
    figures = {
        "train_steps": trainer.global_step,
        "train_tokens": speed.tokens,
        "train_seconds": speed.seconds,
        "train_tokens_per_second": speed.tokens / speed.seconds,
        "train_step_ms": 1000 * speed.seconds / trainer.global_step,
        "parameters": sum(p.numel() for p in cli.model.parameters()),
    }
    folder = Path(trainer.log_dir)
    checkpoint = os.path.relpath(str(resolve_checkpoint("last", trial.path)), trial.path)
    return {"checkpoint": checkpoint, "figures": {**figures, **curves(folder)}}


def source_checkpoint(trial: Trial) -> Path:
    """The weights that a trial starts from.

    Raises:
        UserError: if the source has none.
    """
    folder = Path(trial.source or trial.folder)
    trained = read_json(folder / "trained.json")
    if trained is None:
        raise UserError(f"from: {trial.source} has not been trained")
    return folder / trained["checkpoint"]


def evaluate(trial: Trial, checkpoint: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Evaluate a checkpoint's weights with the trial's config.

    Returns:
        the figures, and the losses by document.

    Raises:
        UserError: if the loss is not finite.
    """
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings = {**trial.settings, **{f"trainer.{key}": False for key in off}}
    # A checkpoint callback of the base would refuse enable_checkpointing=false.
    settings["trainer.callbacks"] = []
    cli = TrialCLI([], args=["--config", trial.base, *arguments(settings)], run=False)
    measuring = Evaluation(checkpoint)
    trainer: Any = cli.trainer
    trainer.callbacks += [SameTexts(trial.path), measuring]
    run = trainer.test if trial.split == "test" else trainer.validate
    named = run(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    figures = {key.split("/")[1]: value for key, value in named.items()}
    if not math.isfinite(figures["loss"]):
        raise UserError(f"loss = {figures['loss']}: must be finite; training has diverged")
    names = getattr(cli.datamodule, f"{trial.split}_store").names
    documents = {names[index]: sums for index, sums in measuring.documents.items()}
    return {**figures, **measuring.figures()}, documents


def run_trial(trial: Trial) -> None:
    """Run what is left of a trial. An error is written to ``failed.json`` and raised.

    Raises:
        KeyboardInterrupt: if it was stopped; it can resume.
    """
    drop_unwanted_messages()
    (trial.path / "failed.json").unlink(missing_ok=True)
    try:
        with FileLock(trial.path / ".lock", timeout=LOCK_SECONDS):
            if trial.result is not None:
                return
            if trial.train:
                trained = read_json(trial.path / "trained.json")
                if trained is None:
                    trained = train(trial)
                    write_json(trial.path / "trained.json", trained)
                checkpoint, figures = trial.path / trained["checkpoint"], trained["figures"]
            else:
                checkpoint, figures = source_checkpoint(trial), {}
            evaluated, documents = evaluate(trial, checkpoint)
            write_json(trial.path / "documents.json", documents)
            write_json(trial.path / "result.json", {**figures, **evaluated})
    except Timeout:
        trial.fail("another process runs it")
        raise
    except SystemExit as stop:
        if stop.code != 2:
            # Lightning exits like this on Ctrl-C.
            raise KeyboardInterrupt from stop
        trial.fail("refused by the command line, see log.txt")
        raise UserError("refused by the command line") from stop
    except Exception as error:
        trial.fail(one_line(str(error)) or type(error).__name__)
        raise
    finally:
        with contextlib.suppress(OSError):
            (trial.path / "progress.json").unlink()


def run_logged(trial: Trial) -> None:
    """As ``run_trial``; what the trial prints goes to its ``log.txt``."""
    # Left open: loggers that are made meanwhile keep it.
    log = (trial.path / "log.txt").open("a", buffering=1, encoding="utf-8")
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run_trial(trial)
