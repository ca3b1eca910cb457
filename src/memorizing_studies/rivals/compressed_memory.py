"""Memories that keep less than every pair: means of consecutive pairs, or one matrix for each head.

Instead of the nearest pairs, a query reads all that a memory layer holds, after it was compressed.
What the layer stores stays as it is, so gates, resets and checkpoints work as ever.

- ``mean``: the mean of ``pool`` pairs that were stored one after another is one slot, and attention
  reads all slots. Rae et al., "Compressive Transformers", 2019, section 3 (mean pooling).
- ``linear``: with sigma(x) = elu(x) + 1, a head holds the matrix sum sigma(k) v^T and the vector
  sum sigma(k), and a query reads sigma(q) M / (sigma(q) z). Katharopoulos et al., 2020, equation 5;
  as a memory: Munkhdalai et al., "Leave No Context Behind", 2024, section 2.1.

Shapes: B rows, H query heads, G key/value heads, N tokens, M slots, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.memory import Neighbours
from memorizing_transformers.memory.attend import MemoryAttention
from memorizing_transformers.memory.view import Readable
from memorizing_transformers.model.gates import GATES

Read = tuple[Tensor, Tensor]
"""Output (B, G, Q, D) and log mass (B, G, Q) of queries."""


def read_means(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, pool: int) -> Read:
    """Attention over means of ``pool`` consecutive slots, of those of them that hold a pair.

    Args:
        queries: (B, G, Q, D) scaled.
        keys: (B, G, M, D), zeros where nothing is stored; ``values`` likewise.
        values: (B, G, M, D).
        valid: (B, M) bool.
        pool: slots of a mean; the last one may have fewer.
    """
    missing = -keys.shape[2] % pool
    pooled = [F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, pool)).sum(3) for x in (keys, values)]
    count = F.pad(valid, (0, missing)).unflatten(1, (-1, pool)).sum(2)[:, None, :, None]
    keys, values = (x / count.clamp(min=1) for x in pooled)
    scores = (queries @ keys.mT).masked_fill(count.mT == 0, -torch.inf)
    # Rows of nothing but minus infinity have no softmax; they are not used.
    scores = scores.masked_fill(~valid.any(1)[:, None, None, None], 0.0)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def read_matrix(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Read:
    """Linear attention to all stored pairs at once; arguments as those of ``read_means``."""
    there = valid[:, None, :, None]
    asked, stored = F.elu(queries) + 1, (F.elu(keys) + 1) * there
    matrix, total = stored.mT @ values, stored.sum(2, keepdim=True)
    mass = (asked @ total.mT).squeeze(-1).clamp(min=1e-9)
    return asked @ matrix / mass[..., None], mass.log()


class CompressedMemory(Callback):
    """Compresses the memory of every memory layer before it is read, in training and tests.

    Args:
        kind: mean or linear.
        pool: Pairs of a mean. Only for ``mean``.
    """

    def __init__(self, kind: Literal["mean", "linear"] = "mean", pool: int = 4) -> None:
        if pool < 1:
            raise ConfigError("CompressedMemory.pool", pool, "must be at least 1")
        self.read: Callable[..., Read] = (
            read_matrix if kind == "linear" else partial(read_means, pool=pool)
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what needs single pairs, and compiled code, which reads others.

        Raises:
            ConfigError: naming the key and what would do.
        """
        module: Any = pl_module
        if module.config.compile:
            raise ConfigError("model.compile", True, "must be false to compress the memory")
        memory = module.config.memory
        # More candidates than one need one of the biases.
        for key, plain in (("copy", []), ("position_bias", "none"), ("match_length", 0)):
            value = getattr(memory, key)
            if value != plain:
                remedy = f"must be {plain} to compress the memory, which leaves no single pairs"
                raise ConfigError(f"model.memory.{key}", value, remedy)
        if GATES[memory.combine].needs_scores:
            usable = ", ".join(name for name, gate in GATES.items() if not gate.needs_scores)
            remedy = f"needs single pairs; to compress the memory it must be one of {usable}"
            raise ConfigError("model.memory.combine", memory.combine, remedy)

    def _take_over(self, pl_module: LightningModule) -> None:
        module: Any = pl_module
        for reader in module.net.readers().values():
            reader.retrieve = partial(self._retrieve, reader)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over."""
        self._take_over(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over."""
        self._take_over(pl_module)

    on_validation_start = on_predict_start = on_test_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        module: Any = pl_module
        for reader in module.net.readers().values():
            vars(reader).pop("retrieve", None)

    def _retrieve(
        self, reader: Any, queries: Tensor, memory: Readable, *_: Any
    ) -> tuple[MemoryAttention, Neighbours, Neighbours, None]:
        """What ``MemoryReader.retrieve`` returns; no single pair counts as retrieved."""
        batch, heads, segment, width = queries.shape
        valid = memory.valid()
        stored, scales = memory.values.float(), memory.value_scales
        stored = stored if scales is None else stored * scales[..., None]
        # Empty slots may hold anything.
        keys, values = (
            x.masked_fill(~valid[:, None, :, None], 0.0) for x in (memory.keys_at(...), stored)
        )
        grouped = queries.reshape(batch, reader.num_kv_heads, -1, width).float()
        with torch.autocast(queries.device.type, enabled=False):
            output, log_mass = self.read(grouped, keys, values, valid)
        shape = (batch, heads, segment)
        found = valid.any(1)[:, None, None].expand(shape)
        none = torch.zeros(*shape, reader.top_k, dtype=torch.int64, device=queries.device)
        neighbours = Neighbours(none, none.bool())
        attention = MemoryAttention(
            output.reshape(queries.shape), log_mass.reshape(shape), none.float(), found
        )
        return attention, neighbours, neighbours, None
