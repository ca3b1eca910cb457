"""What a run will cost, before it starts: bytes on the device and host, FLOPs, checkpoint bytes.

A cost model, not a measurement; tests hold it against one. A product of an (a, b) with a (b, c)
matrix counts 2abc FLOPs; the backward pass of what has weights costs twice its forward pass, that
of local attention, which makes its scores again, two and a half times; a search has none. Local
attention is counted as a CPU does it: on a GPU its kernel also scores what lies behind a query.
Activations are what autograd keeps of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..memory import SEARCHES, STORAGE_DTYPES
from ..memory.search.auto import choose_search
from ..memory.search.kernels.cpu_scan import SCORE_BYTES as HOST_SCORE_BYTES
from ..memory.search.kernels.score_blocks import SCORE_BYTES
from ..memory.storage import slot_bytes
from ..model import GATES, ModelConfig, Transformer
from ..model.attention import MASK_BYTES
from ..model.forecast import chunk_tokens, loss_bytes
from ..model.local_attention import BLOCK
from .muon import is_layer_matrix

OPTIMIZER_COPIES = {"adamw": 2.0, "adafactor": 0.0}
"""Numbers of optimiser state per weight; Adafactor's factors are negligible. Of others two are
assumed; muon keeps one of a matrix."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one step of one run; bytes and FLOPs, all ranks together."""

    parameters: int
    weight_bytes: int
    """Weights in fp32."""
    gradient_bytes: int
    optimizer_bytes: int
    memory_bytes: int
    """Keys, values and bookkeeping of all memory layers, full."""
    cache_bytes: int
    """XL caches."""
    activation_bytes: int
    """Those of attention over the memory are counted on the device, wherever the memory lives."""
    loss_bytes: int
    """Logits and their gradients, of the tokens that the loss takes at once."""
    mask_bytes: int
    """Masks that local attention keeps on a GPU where FlexAttention does not run; not counted."""
    search_bytes: int
    """Scratch of a search: scores that live at once."""
    index_bytes: int
    """Host copies of keys inside cells or faiss indexes, links included; 0 for other searches."""
    model_flops: float
    """Dense layers and local attention, forward and backward."""
    search_flops: float
    """Scoring every slot; what an index would skip is counted."""
    attention_flops: float
    """Attention over what was retrieved, forward and backward."""
    refresh_flops: float
    """Encoding stored tokens again, averaged over the steps between two refreshes."""
    checkpoint_bytes: int
    memory_on_host: bool = False
    """Whether the memory and its search are on the host and the model is not."""

    @property
    def flops(self) -> float:
        """FLOPs of a training step."""
        return self.model_flops + self._memory_flops

    @property
    def _memory_flops(self) -> float:
        return self.search_flops + self.attention_flops + self.refresh_flops

    @property
    def memory_share(self) -> float:
        """Share of a step's FLOPs that the memory takes, in [0, 1]."""
        return self._memory_flops / self.flops

    @property
    def device_bytes(self) -> int:
        """Bytes that live where the model lives."""
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        memory = 0 if self.memory_on_host else self.memory_bytes + self.search_bytes
        return state + memory + self.cache_bytes + self.activation_bytes + self.loss_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes on the host, in addition to those of the device."""
        memory = self.memory_bytes + self.search_bytes if self.memory_on_host else 0
        return self.index_bytes + memory

    def lines(self) -> list[str]:
        """The estimate as aligned lines."""
        memory = [
            ("  memory", _bytes(self.memory_bytes)),
            ("  search", _bytes(self.search_bytes)),
        ]
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("device", _bytes(self.device_bytes)),
            (
                "  weights, gradients, optimiser",
                _bytes(self.weight_bytes + self.gradient_bytes + self.optimizer_bytes),
            ),
            ("  XL caches", _bytes(self.cache_bytes)),
            ("  activations", _bytes(self.activation_bytes)),
            ("  loss", _bytes(self.loss_bytes)),
            *([] if self.memory_on_host else memory),
            ("host", _bytes(self.host_bytes)),
            *(memory if self.memory_on_host else []),
            ("checkpoint", _bytes(self.checkpoint_bytes)),
            ("FLOPs a step", f"{self.flops:.3g}"),
            ("  of which the memory", f"{self.memory_share:.1%}"),
        ]
        if self.mask_bytes:
            rows.append(("masks, GPU without FlexAttention", _bytes(self.mask_bytes)))
        if self.refresh_flops:
            rows.append(("    of which refreshing", f"{self.refresh_flops / self.flops:.1%}"))
        return [f"{name:<34}{value:>16}" for name, value in rows]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count_parameters(config: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Weights of a model, and how many of them are in matrices that muon updates."""
    with torch.device("meta"):
        model = Transformer(replace(config, vocab_size=vocab_size))
    named = [(name, p.numel(), is_layer_matrix(name, p)) for name, p in model.named_parameters()]
    return sum(n for _, n, _ in named), sum(n for _, n, inside in named if inside)


def local_pairs(segment: int, cached: int) -> int:
    """Pairs of a query and a key that local attention scores in a row and head."""
    ends = [min(start + BLOCK, segment) for start in range(0, segment, BLOCK)]
    return sum((cached + end) * min(BLOCK, end - index * BLOCK) for index, end in enumerate(ends))


def device_type(accelerator: object) -> str:
    """The type of the device that a run trains on, cpu or cuda.

    Args:
        accelerator: as in ``trainer.accelerator``; auto is a GPU if this machine has one.
    """
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if accelerator == "cpu" else "cuda"


def estimate(
    config: ModelConfig,
    rows: int,
    segment: int,
    vocab_size: int | None = None,
    optimizer: str = "adamw",
    activation_bytes: int = 4,
    device: str = "cuda",
) -> Estimate:
    """Cost of training a model with a full memory.

    Args:
        config: the model.
        rows: rows B over all ranks.
        segment: tokens N of a segment.
        vocab_size: V; None for the config's own.
        optimizer: as in ``OptimizerConfig.name``.
        activation_bytes: bytes of an activation: 4, or 2 under bf16-mixed.
        device: type of the device that trains, cpu or cuda.

    Raises:
        ValueError: where neither the config nor the caller knows V.
    """
    vocab = vocab_size or config.vocab_size
    if vocab is None:
        raise ValueError("vocab_size: the config leaves it open; give the tokenizer's")
    memory = config.memory
    heads, groups, width = config.num_heads, config.kv_heads, config.head_width
    layers, memory_layers = config.num_layers, len(config.memory_layers) if memory.size else 0
    tokens = rows * segment

    parameters, matrices = count_parameters(config, vocab)
    kernels = config.d_model * (2 * (heads + groups) * width + 2 * config.ff_width)
    dense = layers * kernels + vocab * config.d_model
    if memory.combine == "content":
        dense += memory_layers * config.d_model * heads
    local = 4 * rows * heads * local_pairs(segment, config.xl_cache) * width * layers
    scored = 2 * tokens * heads * memory.size * width * memory_layers
    retrieved = 4 * tokens * heads * memory.top_k * width * memory_layers
    refreshed = 0.0
    if memory.refresh_every_n_steps and memory_layers:
        # A refresh reads M / N segments, up to the last memory layer, whose own memory it leaves.
        below = (config.memory_layers[-1] + 1) / layers
        one = (2 * tokens * (dense - vocab * config.d_model) + local) * below
        one += scored * (memory_layers - 1) / memory_layers
        refreshed = one * memory.size / segment / memory.refresh_every_n_steps

    slot = slot_bytes(STORAGE_DTYPES[memory.dtype], groups, width)
    memory_bytes = rows * memory.size * slot * memory_layers
    cache_bytes = rows * config.xl_cache * 2 * groups * width * 4 * layers

    # What the backward pass keeps, in numbers a token. Of the feed-forward part: its input, as it
    # was, normalised, and scaled, and what ReLU returned. Of attention, besides: queries before,
    # between and after their normalisation and scaling, keys likewise, values, and the output.
    fed = 3 * config.d_model + config.ff_width * (2 if config.activation == "relu2" else 1)
    attended = 3 * config.d_model + 4 * heads * width + 3 * groups * width
    attended += 2 * groups * width * config.xl_cache // segment
    # Of attention over the memory: scores and weights, and two more outputs.
    recalled = 2 * heads * (memory.top_k + width)
    kept = layers * (fed + attended) + memory_layers * recalled + 3 * config.d_model
    if config.value_residual:
        kept += (layers - 1) * groups * width
    again = 0.0
    if config.activation_checkpointing:
        # The inputs of all parts, memory layers' attention, which is not made again, and one part.
        kept = (2 * layers + 3) * config.d_model + memory_layers * (attended + recalled)
        kept += max(fed, attended)
        # Up to the last thing that is kept: the output projections are not made again.
        projected = 2 * tokens * config.d_model * (heads + 2 * groups) * width
        again = (layers - memory_layers) * (projected + local / layers)
        again += layers * 2 * tokens * config.d_model * config.ff_width
    if config.dropout:
        kept += (2 * layers + 2) * config.d_model
    if chunk_tokens(tokens, vocab) < tokens:
        again += 2 * tokens * vocab * config.d_model
    mask = rows * heads * segment * (segment + config.xl_cache) * activation_bytes
    masked = memory_layers + 1 if config.activation_checkpointing else layers
    if GATES[memory.combine].needs_local_mass:
        masked -= memory_layers

    holder = "cpu" if memory.device == "cpu" else device
    name = memory.search
    if name == "auto":
        asked = segment * config.num_heads // groups
        name = choose_search(holder, memory.size, rows, groups, asked).name
    index_bytes = 0
    indexed = SEARCHES[name].index_bytes
    if indexed is not None:
        index_bytes = rows * groups * memory.size * indexed(width) * memory_layers
    weight_bytes = 4 * parameters
    optimizer_bytes = int(weight_bytes * OPTIMIZER_COPIES.get(optimizer, 2.0))
    if optimizer == "muon":
        optimizer_bytes -= 4 * matrices
    room = memory.search_bytes or (HOST_SCORE_BYTES if holder == "cpu" else SCORE_BYTES)
    scratch = min(room, 4 * tokens * heads * memory.size) if memory_layers else 0
    return Estimate(
        parameters=parameters,
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        optimizer_bytes=optimizer_bytes,
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes,
        activation_bytes=tokens * kept * activation_bytes,
        loss_bytes=loss_bytes(tokens, vocab, config.d_model, activation_bytes),
        mask_bytes=masked * mask if mask <= MASK_BYTES else 0,
        search_bytes=scratch,
        index_bytes=index_bytes,
        model_flops=6.0 * tokens * dense + 3.5 * local + again,
        search_flops=float(scored),
        attention_flops=2.0 * retrieved,
        refresh_flops=refreshed,
        checkpoint_bytes=weight_bytes + optimizer_bytes + memory_bytes + cache_bytes,
        memory_on_host=holder != device,
    )
