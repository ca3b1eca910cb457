"""Our side of ``step.py``: trained, its memory filled, and a training step of it for each rival."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import step_shape as shape
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing_transformers.memory import MemoryBank, make_search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer


def config(slots: int) -> ModelConfig:
    """Our model in the shape of the benchmark."""
    memory = MemoryConfig(size=slots, top_k=shape.TOP_K, layers=[shape.MEMORY_LAYER])
    return ModelConfig(
        vocab_size=shape.VOCABULARY,
        d_model=shape.D_MODEL,
        num_layers=shape.LAYERS,
        num_heads=shape.HEADS,
        num_kv_heads=1,
        head_dim=shape.HEAD_WIDTH,
        xl_cache=shape.XL_CACHE,
        memory=memory,
    )


class Ours:
    """Our model, and a full bank for each rival.

    Args:
        folder: where what was trained and filled lies.
        clock: gives seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.folder, self.clock = folder, clock
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype("int64"))
        torch.manual_seed(0)
        self.net = Transformer(config(shape.TRAINING_SLOTS))
        self.reader = self.net.readers()[shape.MEMORY_LAYER]
        self.reader.search = make_search("auto")

    def segment(self, start: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, N)."""
        stop = start + shape.SEGMENT
        return self.tokens[:, start:stop], self.tokens[:, start + 1 : stop + 1]

    def read(self, bank: MemoryBank, start: int, bf16: bool = False) -> tuple[Tensor, Any]:
        """The loss of a segment, and all that forward gave."""
        inputs, targets = self.segment(start)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = self.net.score(inputs, bank, targets)
        assert output.nll is not None
        return output.nll.mean(), output

    def update(
        self, bank: MemoryBank, start: int, optimizer: torch.optim.Optimizer, bf16: bool = False
    ) -> float:
        """One training step; returns its loss."""
        loss, output = self.read(bank, start, bf16)
        bank.commit(output.pairs, token_ids=self.segment(start)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(self, steps: int) -> dict[str, Any]:
        """Train from the start."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=shape.TRAINING_LR)
        bank = self.net.new_memory(shape.ROWS)
        losses = [self.update(bank, step * shape.SEGMENT, optimizer) for step in range(steps)]
        torch.save(self.net.state_dict(), self.folder / "ours.pt")
        parameters = sum(weight.numel() for weight in self.net.parameters())
        return {"parameters": parameters, "loss": float(np.mean(losses[-20:] or [np.nan]))}

    def new_bank(self, slots: int) -> MemoryBank:
        """An empty bank."""
        self.net.config.memory.size = slots
        return self.net.new_memory(shape.ROWS)

    @torch.no_grad()
    def fill(self, start: int, slots: int) -> None:
        """Read on until the memory is full, and save it."""
        self.net.load_state_dict(torch.load(self.folder / "ours.pt", weights_only=True))
        bank = self.new_bank(slots)
        for here in range(start, start + slots, shape.SEGMENT):
            _, output = self.read(bank, here)
            bank.commit(output.pairs, token_ids=self.segment(here)[0])
        save_file(bank.tensors(), self.folder / "ours.safetensors")

    def load(self) -> None:
        """Make ready to step."""
        self.net.load_state_dict(torch.load(self.folder / "ours.pt", weights_only=True))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=shape.MEASURING_LR)
        self.saved = load_file(self.folder / "ours.safetensors")

    def full_bank(self, slots: int) -> MemoryBank:
        """A bank whose memory is full; of a larger one it has the newest pairs."""
        bank = self.new_bank(slots)
        bank.load(self.saved)
        return bank

    def rival(self, slots: int, name: str, bf16: bool, start: int) -> Callable[[], float]:
        """A call that makes one step on its own bank and returns its seconds."""
        bank, search = self.full_bank(slots), make_search(name)
        position = iter(range(start, self.tokens.shape[1] - shape.SEGMENT, shape.SEGMENT))

        def step() -> float:
            self.reader.search = search
            here = next(position)
            begun = self.clock()
            self.update(bank, here, self.optimizer, bf16)
            return self.clock() - begun

        return step

    @torch.no_grad()
    def recall(self, slots: int, name: str, start: int) -> float:
        """Share of the true neighbours that a search finds for the next segment's queries."""
        bank, search = self.full_bank(slots), make_search(name)
        self.reader.search = search
        _, output = self.read(bank, start)
        queries = output.retrievals[shape.MEMORY_LAYER].queries
        queries = queries.reshape(shape.ROWS, 1, -1, shape.HEAD_WIDTH)
        memory = bank.memories[shape.MEMORY_LAYER]
        return measured_recall(search, queries, memory, shape.TOP_K, sample=queries.shape[2])

    def parity(self, slots: int, start: int) -> dict[str, float]:
        """How far exact search and bf16-mixed are from the reference search in fp32.

        Raises:
            SystemExit: where they are too far.
        """
        losses, gradients = {}, {}
        for name, search, bf16 in (
            ("reference", "reference", False),
            ("exact", "exact", False),
            ("bf16-mixed", "exact", True),
        ):
            self.reader.search = make_search(search)
            loss, _ = self.read(self.full_bank(slots), start, bf16)
            made = torch.autograd.grad(loss, list(self.net.parameters()))
            losses[name], gradients[name] = loss.item(), torch.cat([x.flatten() for x in made])
        found = {}
        for name, allowed in (("exact", 1e-4), ("bf16-mixed", 0.05)):
            difference = gradients[name] - gradients["reference"]
            off = float(difference.norm() / gradients["reference"].norm())
            found[f"{name}: loss off by"] = abs(losses[name] / losses["reference"] - 1)
            found[f"{name}: gradients off by"] = off
            if not off < allowed:
                raise SystemExit(f"{name}: gradients are off by {off:.2g}, allowed {allowed}")
        return found
