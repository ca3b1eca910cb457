"""The shape that ``step.py`` and ``peer_step.py`` share. Imports neither project."""

from __future__ import annotations

VOCABULARY = 256
D_MODEL = 512
LAYERS = 6
HEADS = 8
HEAD_WIDTH = 64
MEMORY_LAYER = 2
"""Counted from 0."""
TOP_K = 32
SEGMENT = 512
XL_CACHE = 512
ROWS = 2
TRAINING_SLOTS = 8192
"""Size of the memory while the two models are trained for the benchmark."""
TRAINING_LR = 3e-4
MEASURING_LR = 1e-6
"""So small that what a step costs does not drift while it is measured."""
