"""What a model is made of. Every ablation of the paper is one value here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..memory import SEARCHES, STORAGE_DTYPES
from .gates import GATES

COPY_NAMES = ("neighbours", "repeats")
"""What a copy head can copy from; ``copying.COPIES`` has a class for each."""

if TYPE_CHECKING:
    SearchName = str
    GateName = str
    StorageName = str
    CopyName = str
else:
    # The choices on the command line are the names in the tables.
    SearchName = Literal[tuple(SEARCHES)]
    GateName = Literal[tuple(GATES)]
    StorageName = Literal[tuple(STORAGE_DTYPES)]
    CopyName = Literal[COPY_NAMES]

RUNTIME = {"runtime": True}
"""Marks a field that may differ between the run that wrote a checkpoint and one that reads it."""


def lasting(config: MemoryConfig | ModelConfig) -> dict[str, Any]:
    """The fields that shapes or the meaning of weights depend on."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata != RUNTIME}


def _choose(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(key, value, f"must be one of {', '.join(choices)}")


def _finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(key, value, f"must be at least {least}")


@dataclass
class MemoryConfig:
    """The external memory and how a layer uses it.

    Args:
        size: Slots per row and key/value head. 0 switches the memory off. Run-time setting: a model
            that was trained with one size can be tested with another.
        top_k: Number of stored pairs that each query retrieves.
        layers: Indices of the layers that read the memory, from 0; negative indices count from the
            last layer. [] builds a model without memory. Default: one layer at three quarters of
            the depth.
        search: How neighbours are found. exact finds all. bucketed is approximate and needs one
            pass. cells is approximate, for large memories on a CPU: it scores the groups of similar
            keys that look best. faiss (faiss-ivf, faiss-hnsw, faiss-flat) runs on the host, for
            very large memories. auto chooses by the memory's device and size, and the log says what
            it chose. reference is slow and simple.
        recall_target: Share of the true neighbours that an approximate search shall return, between
            0 and 1.
        search_bytes: Largest number of bytes of scores that exact and bucketed hold at once, in
            addition to the keys of one head. Default: 32 MiB on a CPU, 64 MiB on other devices.
        combine: How the output of the memory and of local attention are combined. gate learns one
            number per head. fixed uses fixed_value for all heads. content computes the share from
            the token's hidden state. joint uses one softmax over retrieved and local keys.
            joint-bias is joint with a learned bias per head on retrieved keys. evidence computes
            the share from the hidden state and from the scores of both.
        fixed_value: Share of the memory if combine is fixed, from 0 to 1.
        gate_init: Initial share of the memory if combine is gate, content or evidence, between
            0 and 1.
        temperature: Learn a factor per head for the scores of retrieved pairs; it starts at 1.
        position_bias: Bias on retrieved pairs. none adds nothing. t5 depends on the distance in
            tokens. learned-absolute depends on the age of the pair in the memory. log falls with
            the logarithm of the distance, by a learned slope per head that starts near 0.
        bias_buckets: Number of buckets of that bias.
        bias_max_distance: Distance in tokens from which t5 uses its last bucket.
        match_length: Add a learned bias that depends on how many tokens up to a retrieved pair
            equal those up to the query; matches of this length and longer ones count alike. 0 = no
            such bias.
        candidates: Number of pairs that are retrieved for each one that is kept. The biases choose
            among them, so more than 1 needs position_bias or match_length.
        copy: What a copy head mixes into the prediction: the tokens of retrieved pairs
            (neighbours), and the tokens that followed where the last tokens occurred before in the
            memory and the segment (repeats). [] builds no copy head.
        copy_init: Initial weight of each of them, between 0 and 1.
        copy_top_k: Number of neighbours of each head, those it attends to most, whose tokens may be
            copied. Fewer make a step faster. Default: top_k.
        dropout: Share of the rows that read no memory in a training step, drawn at random.
        dtype: Storage type of keys and values: float32, bfloat16, or int8 with one scale per
            vector. Run-time setting.
        device: Where keys and values are stored. model stores them with the weights. cpu stores
            them in the host's memory, for memories that are too large for a GPU; the search and the
            attention to retrieved pairs then also run on the host, and only queries and results are
            copied. XL caches stay with the weights. Run-time setting.
        refresh_every_n_steps: Encode all stored pairs again with the current weights every so many
            training steps. 0 = never.
        drop_after_n_steps: Do not retrieve pairs that are older than so many training steps. 0 =
            retrieve pairs of any age.
        drop_below_cosine: Do not retrieve a segment, or anything older, if the mean cosine of its
            stored keys and its keys under the current weights is below this bound. 0 = no bound.
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
    temperature: bool = False
    position_bias: Literal["none", "t5", "learned-absolute", "log"] = "none"
    bias_buckets: int = 32
    bias_max_distance: int = 65536
    match_length: int = 0
    candidates: int = field(default=1, metadata=RUNTIME)
    copy: list[CopyName] = field(default_factory=list)
    copy_init: float = field(default=0.02, metadata=RUNTIME)
    copy_top_k: int | None = field(default=None, metadata=RUNTIME)
    dropout: float = field(default=0.0, metadata=RUNTIME)
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
        for name in self.copy:
            _choose(prefix + "copy", name, COPY_NAMES)
        for key, least in (("match_length", 0), ("candidates", 1)):
            _at_least(prefix + key, getattr(self, key), least)
        if self.candidates > 1 and self.position_bias == "none" and not self.match_length:
            remedy = "needs position_bias or match_length to choose by; set one, or candidates=1"
            raise ConfigError(prefix + "candidates", self.candidates, remedy)
        if self.copy_top_k is not None:
            _at_least(prefix + "copy_top_k", self.copy_top_k, 1)
        if not 0 < self.copy_init < 1:
            raise ConfigError(prefix + "copy_init", self.copy_init, "must lie between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(prefix + "dropout", self.dropout, "must lie in [0, 1)")
        _at_least(prefix + "refresh_every_n_steps", self.refresh_every_n_steps, 0)
        _at_least(prefix + "drop_after_n_steps", self.drop_after_n_steps, 0)
        if not 0 <= self.drop_below_cosine < 1:
            remedy = "must lie in [0, 1); 0 drops nothing"
            raise ConfigError(prefix + "drop_below_cosine", self.drop_below_cosine, remedy)


@dataclass
class ModelConfig:
    """A decoder-only transformer with memory.

    Args:
        vocab_size: Number of tokens V that the model knows. Default: that of the tokenizer.
        d_model: Width of the residual stream.
        num_layers: Number of transformer layers.
        num_heads: Number of query heads H.
        num_kv_heads: Number of key/value heads G; it must divide num_heads. Default: num_heads.
        head_dim: Width D of a head. Default: d_model / num_heads.
        d_ff: Width of the feed-forward layers. Default: 4 * d_model.
        activation: Nonlinearity of the feed-forward layers: relu, or relu2 for its square (So et
            al., 2021, "Primer").
        value_residual: Mix the values of layer 0 into those of every later layer, v + a (v0 - v),
            with a learned share a per layer that starts at 0.5 (Zhou et al., 2024, "Value Residual
            Learning").
        embedding_shortcut: Add the embedding of the token to the input of every layer but the
            first, times a learned factor per layer that starts at 0.
        zero_init_outputs: Start the last linear map of every attention and feed-forward layer at
            zero, so that a new model predicts from the embedding alone. Run-time setting.
        dropout: Dropout probability of the embedding and of every layer's outputs.
        xl_cache: Length of the Transformer-XL cache of every layer in tokens, usually the segment
            length. 0 = no cache. Run-time setting.
        qk_norm: Normalise queries and keys, and learn one scale per head.
        qk_scale_init: Initial value of that scale.
        relative_buckets: Number of buckets of the T5 bias of local attention.
        relative_max_distance: Distance in tokens from which that bias uses its last bucket.
        relative_init: Initial bias of head h towards the key that is h tokens back, in the layers
            below three quarters of the depth. 0 = all biases start at zero. A small model learns
            earlier to follow repetitions if its heads look at fixed distances from the start.
        activation_checkpointing: Compute layers again in the backward pass instead of keeping their
            activations. Searches are not repeated.
        compile: Compile the forward pass of a segment and its loss as one graph with torch.compile;
            search and reads of the memory are ops in it. Where that is not possible, compile
            projections and feed-forward layers alone. Costs a minute or two at the start; a CPU
            needs a C++ compiler and is not faster. Run-time setting.
        memory: Settings of the external memory.
    """

    vocab_size: int | None = None
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    activation: Literal["relu", "relu2"] = "relu"
    value_residual: bool = False
    embedding_shortcut: bool = False
    zero_init_outputs: bool = field(default=False, metadata=RUNTIME)
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
        _choose("model.activation", self.activation, ("relu", "relu2"))
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
        for key in ("qk_scale_init", "relative_init"):
            _finite(f"model.{key}", getattr(self, key))
        self.memory.validate()
        self._check_layers()

    def _check_layers(self) -> None:
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
