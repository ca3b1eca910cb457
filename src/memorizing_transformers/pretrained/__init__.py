"""Trained models: saved, loaded, taken out of a checkpoint."""
