"""What happens around a step: clearing, staleness and what is done about it, throughput."""

from .clearing import MemoryClearing
from .predictions import PredictionWriter
from .staleness import StalenessLogging
from .staleness_control import StalenessControl
from .throughput import Throughput

__all__ = [
    "MemoryClearing",
    "PredictionWriter",
    "StalenessControl",
    "StalenessLogging",
    "Throughput",
]
