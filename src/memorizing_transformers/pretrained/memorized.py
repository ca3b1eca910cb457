"""A pretrained model with a memory.

Shapes: B rows, N segment, W cached tokens, V vocabulary, H query heads, G key/value heads, D head
width.
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..memory import (
    STORAGE_DTYPES,
    MemoryBank,
    OpenSegment,
    PlacedMemory,
    SegmentPairs,
    make_search,
)
from ..model import MemorizingNet, MemoryConfig, ModelConfig, ModelOutput
from ..model.reader import MemoryReader
from .arguments import check_options, check_placement, check_window
from .head import OutputHead
from .hook import LayerHook, attention_modules
from .keys import check_keys, fingerprint_weights
from .passes import Passes
from .rotation import RotaryCalls
from .segment import Segment
from .sink_cache import SinkCache


class MemorizedModel(MemorizingNet):
    """A model of transformers whose memory layers reach far back; ``memorize`` makes it.

    Without a bank it is the model as it was, bit for bit. With one, ``forward`` reads a segment at
    positions 0 to N - 1 and changes nothing; ``bank.commit(output.pairs)`` writes.

    Args:
        base: the model, a decoder with a language-modelling head.
        memory: the memory's settings; ``memory.layers`` are the memory layers.
        xl_cache: cached tokens W of every layer.
        position: where retrieved keys are: at their true distance (at most the window that the
            model was trained on), or all at the start of the segment.
        skip_first: pairs at the start of a segment that are never stored, and pairs at the start
            of a document that stay in the XL cache.

    Raises:
        ConfigError: where the family is not supported, or a setting cannot work.
    """

    prefix = ""
    """Of the keys in error messages."""

    def __init__(
        self,
        base: nn.Module,
        memory: MemoryConfig,
        xl_cache: int = 0,
        position: Literal["distance", "start"] = "distance",
        skip_first: int = 1,
    ) -> None:
        super().__init__()
        memory.validate(f"{self.prefix}memory.")
        check_placement(memory, xl_cache, position, skip_first, self.prefix)
        modules = attention_modules(base)
        if any(hasattr(module, "memory_hook") for module in modules.values()):
            name = str(getattr(base, "name_or_path", type(base).__name__))
            remedy = "has a memory already; use that one, or load the model again"
            raise ConfigError("memorize", name, remedy)
        self.fingerprint = fingerprint_weights(base.state_dict())
        """Of the base's own weights."""
        self.base_dtype = next(base.parameters()).dtype
        """That these had then; with another one their fingerprint is another."""
        self.base_name = str(getattr(base, "name_or_path", ""))
        self.tokenizer: Any = None
        self.base, self.memory_config = base, memory
        self.xl_cache, self.position, self.skip_first = xl_cache, position, skip_first
        kind: Any = base.config.get_text_config()  # type: ignore[union-attr,operator]
        self.window = int(getattr(kind, "max_position_embeddings", None) or 2**31)
        self.num_layers = len(modules)
        for layer in memory.layers or []:
            if not -self.num_layers <= layer < self.num_layers:
                remedy = f"each must lie between 0 and {self.num_layers - 1}, or count from -1 down"
                raise ConfigError(f"{self.prefix}memory.layers", memory.layers, remedy)
        self.memory_layers = tuple(sorted({x % self.num_layers for x in memory.layers or []}))
        count = min(12, self.window - 4)
        self._head = OutputHead(base, kind.vocab_size, count)
        self._calls = RotaryCalls(base)
        self._hooks = {
            layer: LayerHook(module, self._calls, self.window, position == "distance")
            for layer, module in sorted(modules.items())
        }
        self._passes = Passes(base, self._hooks, self._calls)
        self._shapes = check_keys(base, self._hooks, self._run, kind.vocab_size, count)
        search = make_search(memory.search, memory.recall_target, memory.search_bytes)
        heads, width = kind.num_attention_heads, kind.hidden_size
        for layer in self.memory_layers:
            reader = MemoryReader(heads, self._shapes[layer][0], width, memory, search)
            reader.softcap = getattr(kind, "attn_logit_softcapping", None)
            modules[layer].memory_reader = reader.to(self.device)
        groups, head_dim = next(iter(self._shapes.values()), (heads, width // heads))
        self.config = ModelConfig(
            vocab_size=kind.vocab_size,
            d_model=width,
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head_dim,
            xl_cache=xl_cache,
            memory=memory,
        )
        """The base's sizes and the memory's settings, as a model of our own has them."""
        self._modules_by_layer = {layer: modules[layer] for layer in self.memory_layers}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.base.parameters()).device

    def _run(self, segment: Segment, input_ids: Tensor, **options: Any) -> ModelOutput:
        everywhere = bool(self.xl_cache or segment.length)
        layers = {n for n in self._hooks if everywhere or n in self.memory_layers}
        with self._passes.reading(segment, layers):
            return self._head(self.base, input_ids, use_cache=False, **options)

    def check_segment_length(self, segment_length: int) -> None:
        """Refuse segments beyond the base's window, as ``MemorizingNet`` says."""
        check_window(segment_length, self.window, self.prefix)

    def readers(self) -> dict[int, MemoryReader]:
        """By layer, what reads the memory."""
        return {n: m.memory_reader for n, m in self._modules_by_layer.items()}  # type: ignore[misc]

    def architecture(self) -> dict[str, Any]:
        """What the meaning of the weights depends on."""
        kept = {f.name for f in fields(MemoryConfig) if not f.metadata}
        memory = {k: v for k, v in asdict(self.memory_config).items() if k in kept}
        return {
            "position": self.position,
            **{f"memory.{name}": value for name, value in memory.items()},
            "memory.layers": list(self.memory_layers),
        }

    def new_memory(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        size: int | None = None,
    ) -> MemoryBank:
        """An empty bank.

        Args:
            batch_size: rows B.
            device: where the bank is stored. Default: with the weights.
            size: slots of each memory. 0 switches the memory off and keeps the XL caches. Default:
                the configured size.
        """
        settings, device = self.memory_config, device or self.device
        place = "cpu" if settings.device == "cpu" else device
        size = settings.size if size is None else size
        memories, caches = {}, {}
        for layer in self.memory_layers if size else ():
            heads, width = self._shapes[layer]
            dtype = STORAGE_DTYPES[settings.dtype]
            shape = (batch_size, heads, size, width, dtype, place)
            memories[layer] = PlacedMemory(*shape, skip_first=self.skip_first)
        for layer in self._hooks if self.xl_cache else ():
            heads, width = self._shapes[layer]
            dtype = next(self.base.parameters()).dtype
            cache = (batch_size, heads, self.xl_cache, width, dtype, device)
            caches[layer] = SinkCache(*cache, sinks=self.skip_first)
        return MemoryBank(batch_size, memories, caches)

    def forward(
        self,
        input_ids: Tensor,
        memory: MemoryBank | None = None,
        attention_mask: Tensor | None = None,
        *,
        open_segment: OpenSegment | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """Read a segment and change nothing.

        Args:
            input_ids: (B, N) int64.
            memory: the bank of these B rows, or None for the model as it was.
            attention_mask: (B, N) 1 for tokens, 0 for padding. With a bank, padding must be at the
                right of a row; no token sees it, and ``memory.commit`` takes the mask to leave it
                out.
            open_segment: of ``memory``; the tokens follow those that it holds, and are added to it.
            targets: (B, N) int64, -100 for tokens that do not count; with them the output has
                their losses in place of logits.
            options: of the model.

        Raises:
            ValueError: where ``memory`` holds another number of rows.
            ConfigError: where padding is not at the right, an option cannot be used here, or a
                segment is longer than the base's window.
        """
        check_options(options, memory is not None)
        if memory is None:
            return self._head(
                self.base, input_ids, targets, attention_mask=attention_mask, **options
            )
        if memory.batch_size != input_ids.shape[0]:
            rows = input_ids.shape[0]
            raise ValueError(f"a bank of {memory.batch_size} rows got {rows} rows")
        read = input_ids.shape[1] if open_segment is None else open_segment.length
        self.check_segment_length(read)
        if attention_mask is not None and bool((attention_mask.long().diff() > 0).any()):
            remedy = (
                "with a memory, padding must be at the right of a row; set "
                "tokenizer.padding_side = 'right'"
            )
            raise ConfigError("attention_mask", attention_mask.tolist(), remedy)
        caches = {layer: copy(cache) for layer, cache in memory.caches.items()}
        keeps = self.training or torch.is_grad_enabled()
        segment = Segment(dict(memory.memories), caches, keeps)
        if open_segment is not None:
            segment = self._continue(segment, open_segment)
            places = torch.arange(input_ids.shape[1], device=self.device) + open_segment.count
            options["position_ids"] = places.expand(input_ids.shape[0], -1)
        output = self._run(segment, input_ids, targets=targets, **options)
        output.pairs = SegmentPairs(segment.pairs, segment.pairs)
        if open_segment is not None:
            open_segment.append(input_ids, output.pairs)
        output.retrievals = {n: found.detach() for n, found in segment.retrievals.items()}
        return output

    def score(self, input_ids: Tensor, memory: MemoryBank | None, targets: Tensor) -> ModelOutput:
        """Read a segment, and the losses of targets (B, N), without logits of all tokens."""
        output: ModelOutput = self(input_ids, memory, targets=targets)
        return output

    @staticmethod
    def _continue(segment: Segment, open_segment: OpenSegment) -> Segment:
        """The segment that was begun, ready for its next tokens."""
        if open_segment.state is None:
            segment.length = open_segment.length
            open_segment.state = segment
        begun: Segment = open_segment.state
        begun.pairs, begun.retrievals = {}, {}
        return begun

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained weights, the settings and the tokenizer, without the base.

        Args:
            folder: made if missing.
        """
        from .saved import save_memorized

        save_memorized(self, folder)

    @staticmethod
    def from_pretrained(folder: str | Path, base: Any = None, **overrides: Any) -> MemorizedModel:
        """A model that ``save_pretrained`` or the command ``export`` wrote, in evaluation mode.

        Args:
            folder: where it was written.
            base: the pretrained model, its folder or hub name. Default: the one it was saved with.
            overrides: ``xl_cache``, ``dtype`` of the base (default: as it was), and of ``memory``
                the run-time settings that differ.

        Raises:
            ConfigError: where the folder or the base cannot be read, or the base is another one.
        """
        from .saved import load_memorized

        return load_memorized(folder, base, **overrides)
