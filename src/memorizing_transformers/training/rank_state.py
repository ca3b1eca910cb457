"""What belongs to one rank alone: the memory of its rows and its random states.

Written as safetensors, one file a rank, first dimension the row; read back by rows, so that another
number of ranks finds its rows wherever they lie.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..memory import MemoryBank
from .checkpoints import rank_file

ROWS = "rows."
RANDOM = "random."


def random_state() -> dict[str, Tensor]:
    """The random states of this process as tensors: Python, NumPy, torch, and each CUDA device."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    words_numpy = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss]).double(),
        "numpy": words_numpy,
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for device, value in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda.{device}"] = value
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": state["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": state["numpy_gauss"].item(),
        }
    )
    for name, value in state.items():
        if name.startswith("cuda."):
            torch.cuda.set_rng_state(value, int(name.removeprefix("cuda.")))


class RankPart:
    """A copy in host memory of what one rank owns; later steps do not change it.

    Args:
        rank: the rank.
        bank: the memory of its rows; ranks own as many rows each.
        with_memory: whether to hold that memory, or random states alone.
    """

    def __init__(self, rank: int, bank: MemoryBank | None, with_memory: bool = True) -> None:
        num_rows = bank.batch_size if bank is not None else 0
        self.rank = rank
        self.rows = range(rank * num_rows, (rank + 1) * num_rows)
        self.tensors = {RANDOM + name: value for name, value in random_state().items()}
        if bank is not None and with_memory:
            for name, value in bank.tensors().items():
                copied = value.detach().to("cpu", copy=True)
                self.tensors[ROWS + name] = copied.contiguous()

    def write(self, folder: Path) -> Path:
        """Write the rank's part of a checkpoint folder."""
        path = folder / rank_file(self.rank)
        metadata = {"rows": f"{self.rows.start}:{self.rows.stop}"}
        save_file(self.tensors, path, metadata=metadata)
        return path


def load_random_state(folder: Path, rank: int) -> None:
    """Restore the random states that the same rank had."""
    with safe_open(folder / rank_file(rank), framework="pt") as part:
        names = [name for name in part.keys() if name.startswith(RANDOM)]  # noqa: SIM118
        set_random_state({name.removeprefix(RANDOM): part.get_tensor(name) for name in names})


def load_rows(folder: Path, parts: range, first_row: int, num_rows: int) -> dict[str, Tensor]:
    """The tensors of rows ``first_row`` and following; only these rows are read.

    Args:
        folder: the checkpoint.
        parts: the ranks whose files hold these rows.
        first_row: the global number of the first row wanted.
        num_rows: how many.

    Returns:
        by the names of ``MemoryBank.tensors``; {} where the checkpoint holds no memory.
    """
    pieces: dict[str, list[Tensor]] = {}
    last_row = first_row + num_rows
    for rank in parts:
        with safe_open(folder / rank_file(rank), framework="pt") as part:
            begin, end = (int(row) for row in part.metadata()["rows"].split(":"))
            low, high = max(begin, first_row), min(end, last_row)
            for name in part.keys():  # noqa: SIM118
                if name.startswith(ROWS):
                    rows = part.get_slice(name)[low - begin : high - begin]
                    pieces.setdefault(name.removeprefix(ROWS), []).append(rows)
    return {name: torch.cat(rows) for name, rows in pieces.items()}
