"""Train, validate, test or predict: ``python train.py fit --config configs/quickstart.yaml``."""

import sys
from pathlib import Path

# A clone works without being installed, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from memorizing_transformers.failures import run


def main() -> None:
    """Run the command line."""
    from memorizing_transformers.training.cli import main

    main()


if __name__ == "__main__":
    run(main)
