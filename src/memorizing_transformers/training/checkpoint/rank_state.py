"""What belongs to one rank alone: the memory of its rows, its random states, its gradients.

Written as safetensors, one file a rank, first dimension the row; read back by rows, so that another
number of ranks finds its rows wherever they lie.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...memory import MemoryBank
from .folder import DamagedCheckpoint, rank_file

ROWS = "rows."
RANDOM = "random."
GRADIENT = "gradient."
"""Of batches whose optimiser step is still to come, under accumulation."""


def random_state() -> dict[str, Tensor]:
    """The random states of this process as tensors: Python, NumPy, torch, and the device in use."""
    fp64 = torch.float64
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    words_numpy = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=fp64),
        "numpy": words_numpy,
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=fp64),
    }
    for kind, device in _devices().items():
        state[kind] = device.get_rng_state()
    return state


def _devices() -> dict[str, Any]:
    """By their names the kinds of device that this process may draw on."""
    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps
    return found


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what ``random_state`` returned; that of a device that is not here is left out."""
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
    for kind, device in _devices().items():
        # Older checkpoints hold the state of every CUDA device, by number.
        number = device.current_device() if kind == "cuda" else 0
        value = state.get(kind, state.get(f"{kind}.{number}"))
        if value is not None:
            device.set_rng_state(value)


class RankPart:
    """A copy in host memory of what one rank owns; later steps do not change it.

    Args:
        rank: the rank.
        bank: the memory of its rows; ranks own as many rows each.
        with_memory: whether to hold that memory too.
        gradients: what the rank has accumulated, by parameter.
    """

    def __init__(
        self,
        rank: int,
        bank: MemoryBank | None,
        with_memory: bool = True,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        num_rows = bank.batch_size if bank is not None else 0
        self.rank = rank
        self.rows = range(rank * num_rows, (rank + 1) * num_rows)
        self.tensors = {RANDOM + name: value for name, value in random_state().items()}
        kept = {GRADIENT + name: value for name, value in (gradients or {}).items()}
        if bank is not None and with_memory:
            kept |= {ROWS + name: value for name, value in bank.tensors().items()}
        for name, value in kept.items():
            self.tensors[name] = value.detach().to("cpu", copy=True).contiguous()

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


def rows_of(folder: Path, rank: int) -> range:
    """The global numbers of the rows that a rank's part holds.

    Raises:
        DamagedCheckpoint: where the part cannot be read.
    """
    path = folder / rank_file(rank)
    try:
        with safe_open(path, framework="pt") as part:
            begin, end = (int(row) for row in part.metadata()["rows"].split(":"))
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__})") from error
    return range(begin, end)


def load_gradients(folder: Path, parts: Iterable[int]) -> dict[str, Tensor]:
    """The mean of the gradients that these parts hold, by parameter; {} where they hold none."""
    found = []
    for rank in parts:
        with safe_open(folder / rank_file(rank), framework="pt") as part:
            names = [name for name in part.keys() if name.startswith(GRADIENT)]  # noqa: SIM118
            found.append({name.removeprefix(GRADIENT): part.get_tensor(name) for name in names})
    found = [gradients for gradients in found if gradients]
    if len(found) < 2:
        return found[0] if found else {}
    return {name: torch.stack([g[name] for g in found]).mean(0) for name in found[0]}


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
    # To join one piece would copy it.
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in pieces.items()}
