"""Train, validate, test or predict: ``python train.py fit --config configs/quickstart.yaml``."""

from memorizing_transformers.training.cli import main

if __name__ == "__main__":
    main()
