"""How old the memory is, how far its keys have drifted, how the heads use it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...data.batch import Batch
from ...memory import Memory, MemoryBank
from ...model import ModelOutput, Retrieval, Transformer
from ...model.attention import MemoryLayerAttention
from ..sharded import is_sharded, whole


def retrieved_age(memory: Memory, retrieval: Retrieval, step: int) -> tuple[Tensor, Tensor]:
    """Mean age of retrieved pairs, in training steps and in tokens, each neighbour alike.

    Must run before the segment is committed, while the slots still hold what was retrieved.
    """
    row = torch.arange(retrieval.slots.shape[0], device=retrieval.slots.device)
    row = row[:, None, None, None].expand_as(retrieval.slots)[retrieval.valid]
    slots = retrieval.slots[retrieval.valid]
    steps = step - memory.steps[row, slots].double()
    return steps.mean(), (memory.age()[row, slots].double() + 1).mean()


def sample_window(memory: Memory, segment: int) -> tuple[int, Tensor] | None:
    """The oldest whole segment of the fullest row: its row and its slots, in reading order.

    The window begins at a multiple of ``segment`` in its document, as it did when it was read, and
    leaves room for a segment before it to serve as XL cache.
    """
    row = int(memory.fill.argmax())
    written, fill = int(memory.written[row]), int(memory.fill[row])
    first = -(-(written - fill) // segment) * segment
    if first > 0:
        first += segment
    if first + segment > written:
        return None
    positions = torch.arange(first, first + segment, device=memory.written.device)
    return row, positions % memory.size


@torch.no_grad()
def key_drift(net: Transformer, bank: MemoryBank, layer: int, segment: int) -> dict[str, float]:
    """Compare a sample of stored keys with what today's weights write for the same tokens.

    The window is read again behind the segment before it, without memory; so the figure holds the
    weights' change, and with an XL cache or several memory layers also what reached further back.

    Returns:
        mean cosine, mean ratio of norms (stored over new) and the sample's mean step; {} while the
        memory holds less than two segments.
    """
    memory = bank.memories[layer]
    window = sample_window(memory, segment)
    if window is None:
        return {}
    row, slots = window
    tokens = memory.token_ids[row].long()
    fresh = net.new_memory(1)
    fresh.memories.clear()
    if int(memory.positions[row, slots[0]]) > 0 and fresh.caches:
        before = tokens[(slots - segment) % memory.size][None]
        fresh.commit(net(before, fresh).pairs)
    new = net(tokens[slots][None], fresh).pairs[layer][0][0].float()
    stored = memory.keys_at((slice(row, row + 1), slice(None), slots))[0]
    norms = stored.norm(dim=-1) / new.norm(dim=-1).clamp(min=1e-6)
    return {
        "key_cosine": torch.cosine_similarity(stored, new, dim=-1).mean().item(),
        "key_norm_ratio": norms.mean().item(),
        "sample_step": memory.steps[row, slots].double().mean().item(),
    }


class StalenessLogging(Callback):
    """Logs ``memory/*``: fill, share of the output, gates, ages and the drift of stored keys.

    Args:
        every_n_steps: training steps between two measurements; 0 for never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._scalars: dict[str, float] = {}
        self._step = -1
        """The training step that the scalars were measured in."""
        self._module: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe between read and commit."""
        self._module, self._step = pl_module, -1
        if self.every_n_steps > 0 and self._observe not in self._module.readers:
            self._module.readers.append(self._observe)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop observing."""
        if self._observe in self._module.readers:
            self._module.readers.remove(self._observe)

    @torch.no_grad()
    def _observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput) -> None:
        step = self._module.global_step
        # With gradient accumulation a step has several batches; its first one is measured.
        if step % self.every_n_steps or step == self._step:
            return
        self._step = step
        for layer, retrieval in output.retrievals.items():
            memory = bank.memories[layer]
            name = f"layer{layer}"
            self._scalars[f"memory/fill/{name}"] = (memory.fill / memory.size).mean().item()
            self._scalars[f"memory/share/{name}"] = retrieval.share.mean().item()
            valid = memory.valid()
            if not valid.any():
                continue
            stored = (step - memory.steps[valid].double()).mean()
            self._scalars[f"memory/stored_age_steps/{name}"] = stored.item()
            if retrieval.valid.any():
                steps, tokens = retrieved_age(memory, retrieval, step)
                self._scalars[f"memory/retrieved_age_steps/{name}"] = steps.item()
                self._scalars[f"memory/retrieved_age_tokens/{name}"] = tokens.item()
            drift = self._drift(bank, layer, batch.input_ids.shape[1])
            if drift:
                drift["sample_age_steps"] = step - drift.pop("sample_step")
            for key, value in drift.items():
                self._scalars[f"staleness/{key}/{name}"] = value

    def _drift(self, bank: MemoryBank, layer: int, segment: int) -> dict[str, float]:
        net = self._module.net
        if is_sharded(net):  # the ranks' memories differ, and they would not meet in its forward
            return {}
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        try:
            return key_drift(net, bank, layer, segment)
        finally:
            for module, mode in modes:
                module.training = mode

    def _gates(self, net: Transformer) -> dict[str, float]:
        gates = {}
        for index, layer in enumerate(net.layers):
            gate = getattr(layer.attention, "gate", None)
            if isinstance(layer.attention, MemoryLayerAttention) and isinstance(gate, Tensor):
                for head, value in enumerate(torch.sigmoid(whole(gate.detach()).float()).tolist()):
                    gates[f"memory/gate/layer{index}_head{head}"] = value
        return gates

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log what the step's reader saw."""
        if self._scalars and trainer.loggers:
            scalars = {**self._scalars, **self._gates(self._module.net)}
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=self._step)
        self._scalars = {}
