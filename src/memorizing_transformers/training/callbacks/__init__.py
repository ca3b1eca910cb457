"""What happens around a step: clearing, looking at the memory, acting on staleness, timing."""

from .clearing import MemoryClearing
from .figures import LossByPosition
from .predictions import PredictionWriter
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
    "RetrievalHistograms",
    "RetrievalLogging",
    "RetrievalSamples",
    "StalenessControl",
    "StalenessLogging",
    "StepTiming",
    "Throughput",
]
