"""``python -m memorizing_studies.harness``: the command line of lm-evaluation-harness.

It is ``lm_eval`` with one more model, ``--model memorizing``, and the project's tasks: the YAML
files of ``yaml/``. ``--include_path`` names a folder of other tasks instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from memorizing_transformers.failures import run


def main() -> None:
    """Hand all arguments to lm-evaluation-harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print("error: lm-evaluation-harness is missing: pip install '.[eval]'", file=sys.stderr)
        raise SystemExit(2) from None
    from . import memorizing_lm  # noqa: F401 (registers the model)

    options = {argument.partition("=")[0] for argument in sys.argv}
    if options & {"--tasks", "-t"} and not any(name.startswith("--inc") for name in options):
        sys.argv += ["--include_path", str(Path(__file__).parent / "yaml")]
    cli_evaluate()


if __name__ == "__main__":
    run(main)
