"""``python -m memorizing_studies.ablation.worker FOLDER``: runs the trial of a folder."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

from .json_files import read_json
from .trial import Trial, run_trial

WATCH_SECONDS = 1.0


def end_with(runner: int) -> None:
    """End this process as a kill would, as soon as the runner is gone; the trial can go on."""
    while os.getppid() == runner:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def main() -> None:
    """Run the trial that ``trial.json`` describes."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    found = read_json(Path(sys.argv[1]) / "trial.json")
    run_trial(Trial(**{f.name: found[f.name] for f in fields(Trial)}))


if __name__ == "__main__":
    main()
