"""How old the memory is, and how far its keys have drifted."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.batch import Batch, in_fp64
from ...memory import Memory, MemoryBank
from ...model import MemorizingNet, ModelOutput
from ..sharded import is_sharded
from .observer import Observer, log_scalars
from .staleness_control import evaluating


def sample_window(memory: Memory, segment: int) -> tuple[int, Tensor] | None:
    """The oldest complete segment of the fullest row: its row and its slots, in reading order.

    The window begins at a multiple of ``segment`` in its document, as when it was read. The memory
    also holds the segment before it, to fill the XL cache.
    """
    row = int(memory.fill.argmax())
    written, fill = int(memory.written[row]), int(memory.fill[row])
    first = -(-(written - fill) // segment) * segment
    if first > 0:
        first += segment
    if first + segment > written:
        return None
    positions = torch.arange(first, first + segment, device=memory.written.device)
    return row, (positions - memory.origin[row]) % memory.size


@torch.no_grad()
def key_drift(net: MemorizingNet, bank: MemoryBank, layer: int, segment: int) -> dict[str, float]:
    """Compare a sample of stored keys with the keys of the current weights for the same tokens.

    The window is read again after the segment before it, without memory. So the result measures the
    change of the weights, and with an XL cache or several memory layers also the missing context.
    ``memory.refresh.oldest_drift`` differs: it measures every row, in the first memory layer, and
    fills the complete XL cache.

    Returns:
        mean cosine, mean ratio of norms (stored / new) and the sample's mean step; {} while no row
        holds such a window.
    """
    memory = bank.memories[layer]
    window = sample_window(memory, segment)
    if window is None:
        return {}
    row, slots = window
    tokens, last = memory.token_ids[row].long(), max(bank.memories)
    # What lies above the last memory layer, and the logits, say nothing of keys.
    caches = {n: cache for n, cache in net.new_memory(1, size=0).caches.items() if n < last}
    fresh = MemoryBank(1, {}, caches)
    if int(memory.positions[row, slots[0]]) > 0 and caches:
        fresh.commit(net.encode(tokens[(slots - segment) % memory.size][None], fresh))
    read = net.encode(tokens[slots][None], fresh).memory[layer]
    new = read[0][0].float().to(memory.device)
    stored = memory.keys_at((slice(row, row + 1), slice(None), slots))[0]
    norms = stored.norm(dim=-1) / new.norm(dim=-1).clamp(min=1e-6)
    return {
        "key_cosine": torch.cosine_similarity(stored, new, dim=-1).mean().item(),
        "key_norm_ratio": norms.mean().item(),
        "sample_step": in_fp64(memory.steps[row, slots]).mean().item(),
    }


class StalenessLogging(Observer):
    """Logs ``staleness/*`` and the age of the stored pairs.

    The module adds it; list it in the config to set its argument.

    Args:
        every_n_steps: Training steps between two measurements. 0 = never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Log the scalars of this step."""
        scalars = {}
        for layer in output.retrievals:
            memory, name = bank.memories[layer], f"layer{layer}"
            valid = memory.valid()
            if not valid.any():
                continue
            stored = (step - in_fp64(memory.steps[valid])).mean()
            scalars[f"memory/stored_age_steps/{name}"] = stored.item()
            drift = self._drift(bank, layer, batch.input_ids.shape[1])
            if drift:
                drift["sample_age_steps"] = step - drift.pop("sample_step")
            for key, value in drift.items():
                scalars[f"staleness/{key}/{name}"] = value
        if scalars:
            log_scalars(self.trainer, scalars, step)

    def _drift(self, bank: MemoryBank, layer: int, segment: int) -> dict[str, float]:
        net = self.module.net
        if is_sharded(net):  # a forward pass needs all ranks, and not all may have a window
            return {}
        with evaluating(net):
            return key_drift(net, bank, layer, segment)
