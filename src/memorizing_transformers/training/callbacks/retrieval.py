"""What the heads retrieve: its share of the output, its age, and the recall of the search.

Shapes: B rows, H query heads, G key/value heads, N segment, K neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data.batch import Batch, in_fp64
from ...memory import Memory, MemoryBank, Neighbours
from ...memory.search import is_approximate
from ...memory.search.recall import measured_recall
from ...model import MemorizingNet, ModelOutput, Retrieval
from ..sharded import full_tensor
from .observer import Observer, WarnOnce, log_scalars, tensorboards

RECALL_QUERIES = 16
"""Queries of each row and key/value head whose recall is measured."""
HISTOGRAM_PAIRS = 65536
"""Approximate number of retrieved pairs in a histogram of ages."""


def retrieved_ages(memory: Memory, retrieval: Retrieval, step: int) -> tuple[Tensor, Tensor]:
    """Ages of retrieved pairs, in training steps and in tokens; every neighbour has equal weight.

    Must run before the segment is committed, while the slots still hold the retrieved pairs.

    Returns:
        two vectors with one entry for each neighbour that was found.
    """
    row = torch.arange(retrieval.slots.shape[0], device=retrieval.slots.device)
    row = row[:, None, None, None].expand_as(retrieval.slots)[retrieval.valid]
    slots = retrieval.slots[retrieval.valid]
    return step - in_fp64(memory.steps[row, slots]), in_fp64(memory.age()[row, slots]) + 1


def retrieval_recall(memory: Memory, retrieval: Retrieval) -> float:
    """Share of the true neighbours that was retrieved, over a sample of queries.

    Only the exact search runs: the other search has already run for this segment, and one with an
    index may change its index with every query.
    """
    top_k = retrieval.searched.shape[-1]
    asked, slots, valid = (
        x.reshape(x.shape[0], memory.keys.shape[1], -1, x.shape[-1])
        for x in (retrieval.queries, retrieval.searched, retrieval.searched_valid)
    )
    count = asked.shape[2]
    chosen = torch.linspace(0, count - 1, min(RECALL_QUERIES, count), device=asked.device).long()
    found = Neighbours(slots[:, :, chosen], valid[:, :, chosen])
    return measured_recall(lambda *_: found, asked[:, :, chosen], memory, top_k)


def learned_gates(net: MemorizingNet) -> dict[int, Tensor]:
    """By memory layer the share of the memory in each head (H,), if it is a learned number.

    A collective if weights are sharded.
    """
    shares = {layer: reader.gate.learned() for layer, reader in net.readers().items()}
    return {layer: full_tensor(share) for layer, share in shares.items() if share is not None}


class RetrievalLogging(Observer):
    """Logs ``memory/*``: fill, share of the output, gates, ages, recall of approximate searches.

    Args:
        every_n_steps: Training steps between two measurements. 0 = never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Log the scalars of this step."""
        scalars, readers = {}, self.module.net.readers()
        search = self.module.config.memory.search
        for layer, retrieval in output.retrievals.items():
            memory, name = bank.memories[layer], f"layer{layer}"
            scalars[f"memory/fill/{name}"] = (memory.fill / memory.size).mean().item()
            scalars[f"memory/share/{name}"] = retrieval.share.mean().item()
            if readers[layer].gate.depends_on_token:
                for head, share in enumerate(retrieval.share.mean((0, 2)).tolist()):
                    scalars[f"memory/share/{name}_head{head}"] = share
            if not retrieval.valid.any():
                continue
            steps, tokens = retrieved_ages(memory, retrieval, step)
            scalars[f"memory/retrieved_age_steps/{name}"] = steps.mean().item()
            scalars[f"memory/retrieved_age_tokens/{name}"] = tokens.mean().item()
            if is_approximate(search, readers[layer].search):
                scalars[f"memory/recall/{name}"] = retrieval_recall(memory, retrieval)
        if output.copied is not None and batch.mask.any():
            copied = output.copied[batch.mask.to(output.copied.device)]
            scalars["memory/copied"] = copied.mean().item()
        if output.retrievals:
            for layer, gates in learned_gates(self.module.net).items():
                for head, gate in enumerate(gates.tolist()):
                    scalars[f"memory/gate/layer{layer}_head{head}"] = gate
        if scalars:
            log_scalars(self.trainer, scalars, step)


class RetrievalHistograms(Observer):
    """Draws histograms for TensorBoard: gates or shares, ages of retrieved pairs.

    Args:
        every_n_steps: Training steps between two histograms. 0 = never.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(every_n_steps)
        self._warn_once = WarnOnce("histograms of what was retrieved")

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Draw this step's histograms."""
        gates = learned_gates(self.module.net)
        writers = tensorboards(self.trainer)
        if writers:
            self._warn_once(lambda: self._draw(writers, gates, bank, output, step))

    def _draw(
        self,
        writers: list[Any],
        gates: dict[int, Tensor],
        bank: MemoryBank,
        output: ModelOutput,
        step: int,
    ) -> None:
        values: dict[str, Tensor] = {}
        for layer, retrieval in output.retrievals.items():
            name = f"layer{layer}"
            if layer in gates:
                values[f"memory/gate_histogram/{name}"] = gates[layer]
            if not retrieval.valid.any():
                continue
            if layer not in gates:
                values[f"memory/share_histogram/{name}"] = retrieval.share.flatten()
            rows, heads, tokens, top_k = retrieval.slots.shape
            # All neighbours of a token: a stride over them would favour some ranks over others.
            count = min(tokens, max(1, HISTOGRAM_PAIRS // (rows * heads * top_k)))
            chosen = torch.linspace(0, tokens - 1, count, device=retrieval.slots.device).long()
            sample = retrieval._replace(
                slots=retrieval.slots[:, :, chosen], valid=retrieval.valid[:, :, chosen]
            )
            ages = retrieved_ages(bank.memories[layer], sample, step)
            for unit, age in zip(("steps", "tokens"), ages, strict=True):
                values[f"memory/retrieved_age_{unit}_histogram/{name}"] = age
        for tag, tensor in values.items():
            for writer in writers:
                writer.add_histogram(tag, tensor.float().cpu().numpy(), step)
