"""Lets a clone that is not installed find its package under ``src/``, from the clone's root."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if __name__ == "__main__":
    from runpy import run_module

    run_module("memorizing_transformers", run_name="__main__", alter_sys=True)
else:
    del sys.modules[__name__]
    import_module(__name__)
