"""``python -m memorizing_transformers.analysis.worker FOLDER``: runs the trial of a folder."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path

from .trial import Trial, read_json, run_trial


def main() -> None:
    """Run the trial that ``trial.json`` describes."""
    found = read_json(Path(sys.argv[1]) / "trial.json")
    run_trial(Trial(**{f.name: found[f.name] for f in fields(Trial)}), runner=os.getppid())


if __name__ == "__main__":
    main()
