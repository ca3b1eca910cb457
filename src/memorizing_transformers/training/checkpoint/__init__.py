"""Checkpoint folders: weights, position and the memory of every row."""
