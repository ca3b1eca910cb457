"""What a model is made of. Every ablation of the paper is one value here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..memory import SEARCHES, STORAGE_DTYPES
from .gates import GATES

if TYPE_CHECKING:
    SearchName = str
    GateName = str
    StorageName = str
else:
    # The choices on the command line are the names in the tables.
    SearchName = Literal[tuple(SEARCHES)]
    GateName = Literal[tuple(GATES)]
    StorageName = Literal[tuple(STORAGE_DTYPES)]

RUNTIME = {"runtime": True}
"""Marks a field that may differ between the run that wrote a checkpoint and one that reads it."""


def lasting(config: MemoryConfig | ModelConfig) -> dict[str, Any]:
    """The fields that shapes or the meaning of weights depend on."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata != RUNTIME}


def _choose(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(key, value, f"must be one of {', '.join(choices)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(key, value, f"must be at least {least}")


@dataclass
class MemoryConfig:
    """The external memory and how a layer uses it.

    Args:
        size: slots per row and key/value head; 0 switches the memory off. A run-time choice: a
            model trained with one size can be tested with another.
        top_k: neighbours that each query retrieves.
        layers: indices of the layers that reach the memory, counted from 0, negative from the end;
            [] builds a model without memory. The default is one layer three quarters of the way up.
        search: auto (by the memory's device and size, said in the log), exact, bucketed
            (approximate, one pass), faiss (on the host, for very large memories: faiss-ivf,
            faiss-hnsw or faiss-flat) or reference (slow and obvious).
        recall_target: expected share of the true neighbours that an approximate search returns.
        search_bytes: bytes of scores that exact and bucketed hold at once, beside the keys of one
            head; None for what suits the device, 32 MiB on a CPU and 64 MiB elsewhere.
        combine: how memory and local attention are joined: gate (a learned number per head), fixed
            (fixed_value for all), content (computed from the token's hidden state), joint (one
            softmax over neighbours and local keys).
        fixed_value: share of the memory with combine=fixed, in [0, 1].
        gate_init: initial share of the memory with combine=gate or content, in (0, 1).
        position_bias: bias on retrieved pairs: none, t5 (relative distance in tokens) or
            learned-absolute (by age in the memory).
        bias_buckets: buckets of that bias.
        bias_max_distance: distance in tokens from which on t5 uses the last bucket.
        dtype: storage of keys and values: float32, bfloat16, or int8 with a scale for each vector.
            A run-time choice.
        device: where keys and values live: model, beside the weights; or cpu, in the host's memory,
            for what is too large for a GPU: there it is also searched and attended to, and only
            queries and the layer's outcome travel. XL caches stay beside the weights. A run-time
            choice.
        refresh_every_n_steps: training steps after which the pairs of the documents being read are
            encoded anew with the weights of the day; 0 for never.
        drop_after_n_steps: age in training steps beyond which pairs are not retrieved any more; 0
            for any age.
        drop_below_cosine: bound on the mean cosine of a segment's stored keys and today's, below
            which it and what is older are not retrieved any more; 0 for none.
    """

    size: int = field(default=8192, metadata=RUNTIME)
    top_k: int = field(default=32, metadata=RUNTIME)
    layers: list[int] | None = None
    search: SearchName = field(default="exact", metadata=RUNTIME)
    recall_target: float = field(default=0.95, metadata=RUNTIME)
    search_bytes: int | None = field(default=None, metadata=RUNTIME)
    combine: GateName = "gate"
    fixed_value: float = field(default=0.5, metadata=RUNTIME)
    gate_init: float = field(default=0.5, metadata=RUNTIME)
    position_bias: Literal["none", "t5", "learned-absolute"] = "none"
    bias_buckets: int = 32
    bias_max_distance: int = 65536
    dtype: StorageName = field(default="float32", metadata=RUNTIME)
    device: Literal["model", "cpu"] = field(default="model", metadata=RUNTIME)
    refresh_every_n_steps: int = field(default=0, metadata=RUNTIME)
    drop_after_n_steps: int = field(default=0, metadata=RUNTIME)
    drop_below_cosine: float = field(default=0.0, metadata=RUNTIME)

    def validate(self, prefix: str = "model.memory.") -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: naming the field and what would do.
        """
        _at_least(prefix + "size", self.size, 0)
        _at_least(prefix + "top_k", self.top_k, 1)
        if 0 < self.size < self.top_k:
            remedy = f"must be at most {prefix}size ({self.size})"
            raise ConfigError(prefix + "top_k", self.top_k, remedy)
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                _choose(prefix + name, getattr(self, name), get_args(kind))
        if not 0 < self.recall_target < 1:
            remedy = "must lie between 0 and 1; search=exact finds all"
            raise ConfigError(prefix + "recall_target", self.recall_target, remedy)
        if self.search_bytes is not None:
            _at_least(prefix + "search_bytes", self.search_bytes, 1)
        if not 0 <= self.fixed_value <= 1:
            raise ConfigError(prefix + "fixed_value", self.fixed_value, "must lie in [0, 1]")
        if not 0 < self.gate_init < 1:
            raise ConfigError(prefix + "gate_init", self.gate_init, "must lie between 0 and 1")
        _at_least(prefix + "bias_buckets", self.bias_buckets, 4)
        _at_least(prefix + "bias_max_distance", self.bias_max_distance, self.bias_buckets)
        _at_least(prefix + "refresh_every_n_steps", self.refresh_every_n_steps, 0)
        _at_least(prefix + "drop_after_n_steps", self.drop_after_n_steps, 0)
        if not 0 <= self.drop_below_cosine < 1:
            remedy = "must lie in [0, 1); 0 drops nothing"
            raise ConfigError(prefix + "drop_below_cosine", self.drop_below_cosine, remedy)


@dataclass
class ModelConfig:
    """A decoder-only transformer with memory.

    Args:
        vocab_size: tokens V that the model knows; None for the tokenizer's.
        d_model: width of the residual stream.
        num_layers: transformer layers.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of num_heads; None for num_heads.
        head_dim: width D of a head; None for d_model / num_heads.
        d_ff: width of the feed-forward layers; None for 4 * d_model.
        dropout: probability, on the embedding and on every layer's outputs.
        xl_cache: tokens of Transformer-XL cache in every layer, usually the segment length; 0 for
            none. A run-time choice.
        qk_norm: normalise queries and keys and learn a scale per head.
        qk_scale_init: initial value of that scale.
        relative_buckets: buckets of the T5 bias on local attention.
        relative_max_distance: distance in tokens from which on it uses the last bucket.
        relative_init: initial bias of head h towards the key h tokens back, in the layers below
            three quarters of the way up; 0 starts all biases at zero. Heads that look at fixed
            distances from the start let a small model learn sooner to follow repetitions.
        activation_checkpointing: recompute layers in the backward pass; retrieval is not repeated.
        compile: compile projections and feed-forward layers with torch.compile, and local attention
            on a GPU; search and memory stay as they are. Costs a minute or less at the start, and
            on a CPU needs a C++ compiler. A run-time choice.
        memory: the external memory.
    """

    vocab_size: int | None = None
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    dropout: float = field(default=0.0, metadata=RUNTIME)
    xl_cache: int = field(default=0, metadata=RUNTIME)
    qk_norm: bool = True
    qk_scale_init: float = field(default=8.0, metadata=RUNTIME)
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_init: float = field(default=0.0, metadata=RUNTIME)
    activation_checkpointing: bool = field(default=False, metadata=RUNTIME)
    compile: bool = field(default=False, metadata=RUNTIME)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if isinstance(self.memory, dict):
            self.memory = MemoryConfig(**self.memory)
        for key in ("d_model", "num_layers", "num_heads"):
            _at_least(f"model.{key}", getattr(self, key), 1)
        for key in ("vocab_size", "num_kv_heads", "head_dim", "d_ff"):
            if getattr(self, key) is not None:
                _at_least(f"model.{key}", getattr(self, key), 1)
        _at_least("model.xl_cache", self.xl_cache, 0)
        _at_least("model.relative_buckets", self.relative_buckets, 4)
        _at_least("model.relative_max_distance", self.relative_max_distance, self.relative_buckets)
        if self.head_dim is None and self.d_model % self.num_heads:
            remedy = f"must divide model.d_model ({self.d_model}), or set model.head_dim"
            raise ConfigError("model.num_heads", self.num_heads, remedy)
        if self.num_heads % self.kv_heads:
            remedy = f"must divide model.num_heads ({self.num_heads})"
            raise ConfigError("model.num_kv_heads", self.num_kv_heads, remedy)
        if not 0 <= self.dropout < 1:
            raise ConfigError("model.dropout", self.dropout, "must lie in [0, 1)")
        self.memory.validate()
        for layer in self.memory.layers or []:
            if not -self.num_layers <= layer < self.num_layers:
                remedy = f"each must lie between 0 and {self.num_layers - 1}, or count from -1 down"
                raise ConfigError("model.memory.layers", self.memory.layers, remedy)

    @property
    def kv_heads(self) -> int:
        """Key/value heads G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width D of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def ff_width(self) -> int:
        """Width of the feed-forward layers."""
        return self.d_ff or 4 * self.d_model

    @property
    def default_memory_layer(self) -> int:
        """The layer three quarters of the way up, the paper's ninth of twelve, counted from 0."""
        return math.ceil(0.75 * self.num_layers) - 1

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """The layers that reach the memory, ascending, counted from 0."""
        if self.memory.layers is None:
            return (self.default_memory_layer,)
        return tuple(sorted({layer % self.num_layers for layer in self.memory.layers}))

    def architecture(self) -> dict[str, Any]:
        """What the shapes and the meaning of the weights depend on, without run-time choices."""
        own = {k: v for k, v in lasting(self).items() if k != "memory"}
        own.update(num_kv_heads=self.kv_heads, head_dim=self.head_width, d_ff=self.ff_width)
        memory = {**lasting(self.memory), "layers": list(self.memory_layers)}
        return {**own, **{f"memory.{key}": value for key, value in memory.items()}}
