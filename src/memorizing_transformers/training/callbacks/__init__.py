"""What happens around a step: clearing, looking at the memory, acting on staleness, timing."""

from __future__ import annotations

from lightning.pytorch import Callback

from .clearing import MemoryClearing
from .loss_by_position import LossByPosition
from .predictions import PredictionWriter
from .progress_lines import ProgressLines
from .retrieval import RetrievalHistograms, RetrievalLogging
from .samples import RetrievalSamples
from .staleness import StalenessLogging
from .staleness_control import StalenessControl
from .throughput import Throughput
from .timing import StepTiming

__all__ = [
    "LossByPosition",
    "MemoryClearing",
    "PredictionWriter",
    "ProgressLines",
    "RetrievalHistograms",
    "RetrievalLogging",
    "RetrievalSamples",
    "StalenessControl",
    "StalenessLogging",
    "StepTiming",
    "Throughput",
    "standard_callbacks",
]


def standard_callbacks(often: int, seldom: int) -> list[Callback]:
    """What every run has, in the order that they act before a step: throughput counts what a
    refresh costs.

    Args:
        often: training steps between two measurements of what is logged as scalars; 0 for never.
        seldom: training steps between two histograms and sample retrievals; with 0 there are none,
            nor is loss drawn by position.
    """
    return [
        MemoryClearing(),
        RetrievalLogging(often),
        StalenessLogging(often),
        StepTiming(often),
        RetrievalHistograms(seldom),
        RetrievalSamples(seldom),
        *([LossByPosition()] if seldom else []),
        Throughput(),
        StalenessControl(),
    ]
