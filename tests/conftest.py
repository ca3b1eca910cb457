"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def start_alike() -> None:
    """The same random numbers in every test, alone or in company."""
    # On tensors this small two threads are slower than one, and far slower on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test with bytes after its argument: an archive holds the time at which it was made.

    Workers of pytest-xdist must collect the same names.
    """
    return argname if isinstance(val, bytes) else None
