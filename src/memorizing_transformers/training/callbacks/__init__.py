"""What happens around a step: clear and observe the memory, control staleness, measure time."""

from __future__ import annotations

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
]
