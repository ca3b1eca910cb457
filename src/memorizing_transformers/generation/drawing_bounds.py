"""Bounds of what shapes the drawing of tokens, alike for the command line and the server."""

from __future__ import annotations

from ..errors import ConfigError


def check_drawing(temperature: float, repetition_penalty: float) -> None:
    """Refuse numbers with which logits in fp32 are no numbers any more.

    Raises:
        ConfigError: naming the setting.
    """
    if temperature != 0 and not 1e-4 <= temperature <= 100:
        remedy = "must be 0 (always the likeliest token), or lie between 0.0001 and 100"
        raise ConfigError("temperature", temperature, remedy)
    if not 1e-3 <= repetition_penalty <= 1e3:
        remedy = "must lie between 0.001 and 1000; 1 is off"
        raise ConfigError("repetition_penalty", repetition_penalty, remedy)
