"""The folder that a command writes its results to."""

from __future__ import annotations

from pathlib import Path

from memorizing_transformers.data.sources.documents import first_line
from memorizing_transformers.errors import ConfigError


def out_folder(out: str) -> Path:
    """The folder to write to, made if it is missing.

    Args:
        out: its path, the value of the option ``out``.

    Raises:
        ConfigError: where nothing can be written there.
    """
    if not out:
        raise ConfigError("out", out, "must name a folder")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".partial"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        remedy = f"cannot be written to ({first_line(error)}); give another folder"
        raise ConfigError("out", out, remedy) from error
    return folder
