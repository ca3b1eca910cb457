"""Keeps what does not concern the user off the terminal."""

from __future__ import annotations

import logging
import warnings

ADVERTISING = "💡 Tip"
"""How Lightning's log messages begin that recommend other products."""

WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # between Lightning and torch
    r".*does not have many workers",  # our loader reads a memory map
    r"You have overridden `transfer_batch_to_device`",  # ours is meant to be used
    r".*The dirpath has changed from",  # a test logs to another folder than the fit
)
"""How warnings begin that nobody can act upon."""


def _wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVERTISING)


def drop_unwanted_messages() -> None:
    """Drop these messages for the rest of the process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_wanted)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
