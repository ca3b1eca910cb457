"""What the heads retrieve: how much of their output, how old, and how many of the true neighbours.

Shapes: B rows, H query heads, G key/value heads, N segment, K neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ...data.batch import Batch, in_fp64
from ...memory import Memory, MemoryBank, Neighbours
from ...memory.search.recall import measured_recall
from ...model import ModelOutput, Retrieval, Transformer
from ...model.attention import MemoryLayerAttention
from ..sharded import whole
from .observing import Harmless, Observer, log_scalars, tensorboards

APPROXIMATE = ("bucketed", "faiss", "faiss-ivf", "faiss-hnsw")
"""Searches that may miss neighbours."""
RECALL_QUERIES = 16
"""Queries of each row and key/value head whose recall is measured."""
HISTOGRAM_PAIRS = 65536
"""About as many retrieved pairs make a histogram of ages."""


def retrieved_ages(memory: Memory, retrieval: Retrieval, step: int) -> tuple[Tensor, Tensor]:
    """Ages of retrieved pairs, in training steps and in tokens, each neighbour alike.

    Must run before the segment is committed, while the slots still hold what was retrieved.

    Returns:
        two vectors, an entry for every neighbour that was found.
    """
    row = torch.arange(retrieval.slots.shape[0], device=retrieval.slots.device)
    row = row[:, None, None, None].expand_as(retrieval.slots)[retrieval.valid]
    slots = retrieval.slots[retrieval.valid]
    return step - in_fp64(memory.steps[row, slots]), in_fp64(memory.age()[row, slots]) + 1


def retrieval_recall(memory: Memory, retrieval: Retrieval, num_kv_heads: int) -> float:
    """Share of the true neighbours among what was retrieved, over a sample of queries.

    Only the exact search runs: what was found is at hand, and a search with an index may learn
    from every question that it is asked.
    """
    top_k = retrieval.slots.shape[-1]
    asked, slots, valid = (
        x.reshape(x.shape[0], num_kv_heads, -1, x.shape[-1])
        for x in (retrieval.queries, retrieval.slots, retrieval.valid)
    )
    count = asked.shape[2]
    chosen = torch.linspace(0, count - 1, min(RECALL_QUERIES, count), device=asked.device).long()
    found = Neighbours(slots[:, :, chosen], valid[:, :, chosen])
    return measured_recall(lambda *_: found, asked[:, :, chosen], memory, top_k)


def memory_attention(net: Transformer) -> dict[int, MemoryLayerAttention]:
    """The layers that reach the memory."""
    attentions = {index: layer.attention for index, layer in enumerate(net.layers)}
    return {i: a for i, a in attentions.items() if isinstance(a, MemoryLayerAttention)}


def learned_gates(net: Transformer) -> dict[int, Tensor]:
    """By memory layer the share of the memory in each head (H,), where it is a learned number.

    A collective where weights are sharded.
    """
    gates = {layer: attention.gate for layer, attention in memory_attention(net).items()}
    return {
        layer: torch.sigmoid(whole(gate.detach()).float())
        for layer, gate in gates.items()
        if isinstance(gate, Tensor)
    }


class RetrievalLogging(Observer):
    """Logs ``memory/*``: fill, share of the output, gates, ages, recall of approximate searches.

    Args:
        every_n_steps: training steps between two measurements; 0 for never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)
        self._searches: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to observe."""
        super().on_fit_start(trainer, pl_module)
        attentions = memory_attention(self._module.net)
        self._searches = {layer: attention.search for layer, attention in attentions.items()}

    def _is_approximate(self, layer: int) -> bool:
        # The automatic choice knows what it chose once it has searched.
        choice = getattr(self._searches[layer], "choice", None)
        name = choice.name if choice is not None else self._module.config.memory.search
        return name in APPROXIMATE

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Log the scalars of this step."""
        config, scalars = self._module.config, {}
        for layer, retrieval in output.retrievals.items():
            memory, name = bank.memories[layer], f"layer{layer}"
            scalars[f"memory/fill/{name}"] = (memory.fill / memory.size).mean().item()
            scalars[f"memory/share/{name}"] = retrieval.share.mean().item()
            if config.memory.combine in ("content", "joint"):
                for head, share in enumerate(retrieval.share.mean((0, 2)).tolist()):
                    scalars[f"memory/share/{name}_head{head}"] = share
            if not retrieval.valid.any():
                continue
            steps, tokens = retrieved_ages(memory, retrieval, step)
            scalars[f"memory/retrieved_age_steps/{name}"] = steps.mean().item()
            scalars[f"memory/retrieved_age_tokens/{name}"] = tokens.mean().item()
            if self._is_approximate(layer):
                recall = retrieval_recall(memory, retrieval, config.kv_heads)
                scalars[f"memory/recall/{name}"] = recall
        if output.retrievals:
            for layer, gates in learned_gates(self._module.net).items():
                for head, gate in enumerate(gates.tolist()):
                    scalars[f"memory/gate/layer{layer}_head{head}"] = gate
        if scalars:
            log_scalars(self._trainer, scalars, step)


class RetrievalHistograms(Observer):
    """Draws histograms for TensorBoard: gates or shares, ages of retrieved pairs.

    Args:
        every_n_steps: training steps between two histograms; 0 for never.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(every_n_steps)
        self._harmless = Harmless("histograms of what was retrieved")

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Draw this step's histograms."""
        gates = learned_gates(self._module.net)
        writers = tensorboards(self._trainer)
        if writers:
            self._harmless(lambda: self._draw(writers, gates, bank, output, step))

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
            # Whole tokens: a stride over the neighbours would favour some ranks over others.
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
