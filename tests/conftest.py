"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def start_alike() -> None:
    """The same random numbers in every test, alone or in company. One thread: the tensors are small, two are slower."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
