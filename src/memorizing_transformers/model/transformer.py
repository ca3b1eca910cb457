"""The transformer: plain torch, no trainer, no tokenizer.

Shapes: B rows, N segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..memory import (
    STORAGE_DTYPES,
    Memory,
    MemoryBank,
    OpenSegment,
    Pairs,
    SegmentPairs,
    XLCache,
    can_lend,
    lend,
    make_search,
)
from .attention import Attention, MemoryLayerAttention
from .compiled import run_whole
from .config import ModelConfig
from .forecast import forecast
from .layer import First, Layer
from .mixing import CopyHead
from .network import MemorizingNet, ModelOutput
from .opaque_forecast import run_in_graph
from .reader import MemoryReader, Retrieval
from .renamed import as_today


def _rename(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    current = as_today(state_dict)
    state_dict.clear()
    state_dict.update(current)


class Transformer(MemorizingNet):
    """A decoder-only language model whose memory layers reach far back.

    Forward reads a ``MemoryBank`` and changes nothing; ``bank.commit(output.pairs)`` writes.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "must be set before the model is built")
        self.config = config
        search = make_search(
            config.memory.search, config.memory.recall_target, config.memory.search_bytes
        )
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Layer(
                config,
                MemoryLayerAttention(config, search, layer == 0)
                if layer in config.memory_layers
                else Attention(config, layer == 0),
                layer == 0,
            )
            for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.copy_head: CopyHead | None = None
        memory = config.memory
        if memory.copy and config.memory_layers:
            self.copy_head = CopyHead(config.num_heads, config.d_model, memory)
        self.register_load_state_dict_pre_hook(_rename)
        self.init_weights()

    def init_weights(self) -> None:
        """Embedding N(0, 1); dense kernels truncated normal with variance 1 / fan-in.

        Each weight's start depends on the seed and its own name alone, so that two variants of a
        model begin alike in all that they share. It is drawn on the CPU and copied, so that every
        device begins with the same weights.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            seed = (torch.initial_seed() + crc32(name.encode())) % 2**64
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn = torch.empty_like(module.weight, device="cpu", requires_grad=False)
            if isinstance(module, nn.Linear):
                # 0.8796 is the standard deviation of a unit normal cut at two sigma.
                std = module.in_features**-0.5 / 0.8796
                nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
            elif module is self.embedding:
                nn.init.normal_(drawn, generator=generator)
            else:
                continue
            with torch.no_grad():
                module.weight.copy_(drawn)
        for layer in list(self.layers)[: self.config.default_memory_layer]:
            assert isinstance(layer, Layer)
            layer.attention.bias.look_back(self.config.relative_init)
        for layer in self.layers if self.config.zero_init_outputs else []:
            assert isinstance(layer, Layer)
            layer.silence()

    def readers(self) -> dict[int, MemoryReader]:
        """By layer, what reads the memory."""
        attentions = {index: layer.attention for index, layer in enumerate(self.layers)}
        return {
            index: attention.reader
            for index, attention in attentions.items()
            if isinstance(attention, MemoryLayerAttention)
        }

    def memory_parameters(self) -> list[nn.Parameter]:
        """The parameters that are only used with a memory: those of readers and copy head."""
        head = [] if self.copy_head is None else list(self.copy_head.parameters())
        return super().memory_parameters() + head

    def blocks(self) -> list[nn.Module]:
        """The layers."""
        return list(self.layers)

    def architecture(self) -> dict[str, Any]:
        """What the shapes and the meaning of the weights depend on, of the config."""
        return self.config.architecture()

    def new_memory(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        size: int | None = None,
    ) -> MemoryBank:
        """An empty bank.

        Args:
            batch_size: rows B.
            device: where XL caches are stored, and with ``memory.device=model`` the memory too.
                Default: with the weights.
            size: slots of each memory. 0 switches the memory off and keeps the XL caches. Default:
                the configured size.
        """
        config = self.config
        device = device or self.embedding.weight.device
        place = "cpu" if config.memory.device == "cpu" else device
        dtype = STORAGE_DTYPES[config.memory.dtype]
        shape = (batch_size, config.kv_heads)
        memories = {}
        size = config.memory.size if size is None else size
        if size:
            memories = {
                layer: Memory(*shape, size, config.head_width, dtype, place)
                for layer in config.memory_layers
            }
        caches = {}
        if config.xl_cache:
            caches = {
                layer: XLCache(*shape, config.xl_cache, config.head_width, torch.float32, device)
                for layer in range(config.num_layers)
            }
        reads_tokens = bool(config.memory.copy or config.memory.match_length)
        return MemoryBank(batch_size, memories, caches, reads_tokens)

    def forward(
        self,
        input_ids: Tensor,
        memory: MemoryBank | None = None,
        *,
        open_segment: OpenSegment | None = None,
        targets: Tensor | None = None,
    ) -> ModelOutput:
        """Read a segment.

        Padding may be at the right of a row: no token before it sees it. Leave it out when
        committing.

        Args:
            input_ids: (B, N) int64.
            memory: the bank of these B rows, or None for plain attention within the segment.
            open_segment: of ``memory``; the tokens follow those that it holds, and are added to it.
            targets: (B, N) int64, -100 for tokens that do not count; with them the output has
                their losses in place of logits.

        Raises:
            ValueError: where ``memory`` holds another number of rows.
        """
        bank = memory or MemoryBank(input_ids.shape[0])
        if bank.batch_size != input_ids.shape[0]:
            # A bank of one row would broadcast, and every row read its memory.
            raise ValueError(f"a bank of {bank.batch_size} rows got {input_ids.shape[0]} rows")
        new_ids = input_ids
        caches: Mapping[int, Any] = bank.caches
        if open_segment is not None:
            caches = {layer: open_segment.before(layer) for layer in range(len(self.layers))}
            input_ids = torch.cat([open_segment.input_ids.to(new_ids), new_ids], 1)
        given = (new_ids, input_ids, caches)
        if self.config.compile and open_segment is None and self._fits_one_graph(bank):
            like = (targets is None, *bank.memories, None, *caches)
            searches = {layer: reader.search for layer, reader in self.readers().items()}
            repeats = None if self.copy_head is None else self.copy_head.repeats
            lent = lend(bank.memories, searches, repeats)
            output = run_whole(Transformer._read, self, like, *given, lent, targets)
        else:
            output = self._read(*given, bank.memories, targets)
        if open_segment is not None:
            open_segment.append(new_ids, output.pairs)
        return output

    def _fits_one_graph(self, bank: MemoryBank) -> bool:
        """Whether one graph can read this bank with these weights: not if they are sharded."""
        plain = all(type(weight) is nn.Parameter for weight in self.layers[-1].parameters())
        return plain and all(map(can_lend, bank.memories.values()))

    def _read(
        self,
        new_ids: Tensor,
        input_ids: Tensor,
        caches: Mapping[int, Any],
        memories: Mapping[int, Any],
        targets: Tensor | None,
    ) -> ModelOutput:
        """What ``forward`` does, as a function of tensors.

        Args:
            new_ids: (B, N) the tokens that are read.
            input_ids: (B, n + N) those of the segment up to there.
            caches: by layer, what they see before them.
            memories: by layer.
            targets: (B, N), or None.
        """
        embedded = self.dropout(self.embedding(new_ids))
        count = self.config.num_layers
        x, _, pairs, retrievals = self._layers(embedded, count, caches, memories, input_ids)
        x = self.dropout(self.norm(x))
        output = self._predict(x, input_ids, memories, retrievals, targets)
        output.pairs = SegmentPairs(pairs, pairs)
        output.retrievals = {number: one.detach() for number, one in retrievals.items()}
        return output

    def score(self, input_ids: Tensor, memory: MemoryBank | None, targets: Tensor) -> ModelOutput:
        """Read a segment, and the losses of targets (B, N); logits of all tokens never exist."""
        output: ModelOutput = self(input_ids, memory, targets=targets)
        return output

    def _predict(
        self,
        x: Tensor,
        input_ids: Tensor,
        memories: Mapping[int, Any],
        retrievals: dict[int, Retrieval],
        targets: Tensor | None,
    ) -> ModelOutput:
        """Logits, or the losses of targets, from normalised hidden states x (B, N, d_model)."""
        weight, hidden = self.embedding.weight, x * self.config.d_model**-0.5
        found = copied = None
        if self.copy_head is not None and retrievals:
            last = max(retrievals)
            where = (memories[last], retrievals[last])
            found = self.copy_head.find(x, input_ids, *where, len(weight))
        if targets is None:
            logits = F.linear(hidden, weight)
            if self.copy_head is not None and found is not None:
                logits, copied = self.copy_head.mix(logits, found)
            return ModelOutput(logits, SegmentPairs({}, {}), copied=copied)
        tokens = None if found is None else found.tokens
        run = run_in_graph if torch.compiler.is_compiling() else None
        own = forecast(hidden, weight, targets, tokens, run=run)
        nll, best = own.nll, own.best
        if self.copy_head is not None and found is not None:
            nll, best, copied = self.copy_head.score(own, targets, found)
        hits = best == targets
        return ModelOutput(None, SegmentPairs({}, {}), copied=copied, nll=nll, hits=hits)

    def _layers(
        self,
        embedded: Tensor,
        count: int,
        caches: Mapping[int, Any],
        memories: Mapping[int, Any],
        input_ids: Tensor,
    ) -> tuple[Tensor, First | None, dict[int, Pairs], dict[int, Retrieval]]:
        """The first ``count`` layers: their output, what later ones need, pairs and retrievals."""
        x, first = embedded, None
        pairs: dict[int, Pairs] = {}
        retrievals: dict[int, Retrieval] = {}
        for index, layer in enumerate(list(self.layers)[:count]):
            memory = memories.get(index)
            x, (keys, values), retrieval = layer(x, caches.get(index), memory, input_ids, first)
            pairs[index] = (keys.detach(), values.detach())
            if retrieval is not None:
                retrievals[index] = retrieval
            first = first or (embedded, values)
        return x, first, pairs, retrievals

    def encode(self, input_ids: Tensor, memory: MemoryBank) -> SegmentPairs:
        """The pairs of a segment up to the last memory layer; no later layer is computed.

        Args:
            input_ids: (B, N) int64, on any device.
            memory: the bank of these B rows.
        """
        last = max(self.config.memory_layers)
        input_ids = input_ids.to(self.embedding.weight.device)
        embedded = self.dropout(self.embedding(input_ids))
        stores = (memory.caches, memory.memories)
        x, first, pairs, _ = self._layers(embedded, last, *stores, input_ids)
        layer = self.layers[last]
        assert isinstance(layer, Layer)
        pairs[last] = layer.pairs(x, first)
        return SegmentPairs(pairs, pairs)
