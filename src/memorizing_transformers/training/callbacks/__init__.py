"""What happens around a step: clearing, staleness, throughput."""

from .clearing import MemoryClearing
from .predictions import PredictionWriter
from .staleness import StalenessLogging
from .throughput import Throughput

__all__ = ["MemoryClearing", "PredictionWriter", "StalenessLogging", "Throughput"]
