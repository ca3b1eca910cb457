"""Names that callbacks watch (``monitor``) against those that a run logs."""

from __future__ import annotations

from difflib import get_close_matches
from traceback import walk_tb
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics import MetricCollection

from ..errors import UserError

CALLBACKS = "lightning.pytorch.callbacks."
OF_SPLITS = ("train/", "val/", "test/")
KNOWN_PACKAGES = ("lightning", "memorizing_transformers", "memorizing_studies")
"""Whose classes log nothing else under ``OF_SPLITS`` than the module's own metrics."""


def is_of_monitor(error: BaseException, trainer: Any) -> bool:
    """Whether a callback ended the run because what it watches was not logged; alike on all ranks.

    Args:
        error: as caught.
        trainer: the run's.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if not frames or not frames[-1].f_globals["__name__"].startswith(CALLBACKS):
        return False
    watching = [c for c in trainer.callbacks if isinstance(c, EarlyStopping | ModelCheckpoint)]
    return any(c.monitor and c.monitor not in trainer.callback_metrics for c in watching)


def check_monitors(trainer: Any, module: Any) -> None:
    """Refuse a name that no part of the run can log; its callback would end the run much later.

    Only names of the splits are looked at, and only where all that logs is known.

    Raises:
        UserError: naming the callback and its ``monitor``.
    """
    logging = [module, *trainer.callbacks]
    if any(type(one).__module__.partition(".")[0] not in KNOWN_PACKAGES for one in logging):
        return
    known = [
        str(name)
        for metrics in module.children()
        if isinstance(metrics, MetricCollection) and metrics.prefix != "test/"
        for name in metrics
    ]
    for callback in trainer.callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint):
            continue
        watched = callback.monitor
        if watched is None or watched in known or not watched.startswith(OF_SPLITS):
            continue
        if getattr(callback, "strict", True):
            near = get_close_matches(watched, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__}: monitor = {watched!r}: is not "
                f"logged in training{meant or '; give one of ' + ', '.join(known)}"
            )
