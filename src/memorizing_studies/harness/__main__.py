"""``python -m memorizing_studies.harness``: the command line of lm-evaluation-harness.

It is ``lm_eval`` with one more model, ``--model memorizing``.
"""

from __future__ import annotations

import sys

from memorizing_transformers.failures import run


def main() -> None:
    """Hand all arguments to lm-evaluation-harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print("error: lm-evaluation-harness is missing: pip install '.[eval]'", file=sys.stderr)
        raise SystemExit(2) from None
    from . import memorizing_lm  # noqa: F401 (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    run(main)
