"""The model as one would explain it: per row, head and token, over lists, one number at a time.

Shares no code with the package but the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.model.attention import Attention


@dataclass
class Document:
    """What a row has read of its current document: by layer, a (key, value) of each token."""

    pairs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


def bucket_of(distance: int, num_buckets: int, max_distance: int) -> int:
    """The last bucket whose first distance is not beyond ``distance``."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    growth = (max_distance / exact) ** (1 / (num_buckets - exact))
    firsts = [exact * growth**step for step in range(num_buckets - exact)]
    return exact - 1 + sum(first <= distance + 1e-6 for first in firsts)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum() + 1e-6).sqrt()


def logits(
    model: Transformer, input_ids: Tensor, documents: list[Document], lengths: list[int]
) -> Tensor:
    """Logits (B, N, V) of the first ``lengths[row]`` tokens of each row, zeros behind.

    Then the segment is appended to ``documents``.
    """
    outputs = []
    for ids, document, length in zip(input_ids, documents, lengths, strict=True):
        hidden = [model.embedding.weight[token] for token in ids[:length]]
        for index, layer in enumerate(model.layers):
            past = document.pairs.setdefault(index, [])
            normed = [rms_norm(x, layer.attention_norm.weight) for x in hidden]
            attended, pairs = attention(layer.attention, model.config, index, normed, past)
            past.extend(pairs)
            hidden = [x + y for x, y in zip(hidden, attended, strict=True)]
            norm, widen, _, narrow = layer.feed_forward
            hidden = [
                x + narrow.weight @ (widen.weight @ rms_norm(x, norm.weight)).relu() for x in hidden
            ]
        scale = model.config.d_model**-0.5
        row = [model.embedding.weight @ rms_norm(x, model.norm.weight) * scale for x in hidden]
        padding = [torch.zeros(len(model.embedding.weight))] * (len(ids) - length)
        outputs.append(torch.stack(row + padding))
    return torch.stack(outputs)


def attention(
    layer: Attention,
    config: ModelConfig,
    index: int,
    hidden: list[Tensor],
    past: list[tuple[Tensor, Tensor]],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """A layer's attention of one row's tokens, and their pairs, each (G, D)."""
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_width
    keys = [(layer.key.weight @ x).view(kv_heads, width) for x in hidden]
    values = [(layer.value.weight @ x).view(kv_heads, width) for x in hidden]
    if config.qk_norm:
        keys = [torch.stack([unit(key) for key in token]) for token in keys]
    new = list(zip(keys, values, strict=True))
    cached = past[-config.xl_cache :] if config.xl_cache else []
    reached = past[-config.memory.size :] if config.memory.size else []
    if index not in config.memory_layers:
        reached = []
    outputs = []
    for token, x in enumerate(hidden):
        queries, merged = (layer.query.weight @ x).view(heads, width), []
        for head in range(heads):
            group = head // (heads // kv_heads)
            query = queries[head] / width**0.5
            if config.qk_norm:
                query = unit(queries[head]) * layer.scale[head].abs()

            near = cached + new[: token + 1]
            buckets = [
                bucket_of(distance, config.relative_buckets, config.relative_max_distance)
                for distance in reversed(range(len(near)))
            ]
            scores = torch.stack([key[group] for key, _ in near]) @ query
            scores = scores + layer.bias.table.weight[buckets, head]
            near_values = torch.stack([value[group] for _, value in near])
            if not reached:
                merged.append(scores.softmax(0) @ near_values)
                continue

            far_scores = torch.stack([key[group] for key, _ in reached]) @ query
            places = sorted(range(len(reached)), key=far_scores.tolist().__getitem__, reverse=True)
            places = places[: config.memory.top_k]
            written_since = [len(reached) - 1 - place for place in places]
            far_scores = far_scores[places] + memory_bias(layer, config, written_since, token, head)
            far_values = torch.stack([reached[place][1][group] for place in places])

            if config.memory.combine == "joint":
                weights = torch.cat([scores, far_scores]).softmax(0)
                merged.append(weights @ torch.cat([near_values, far_values]))
                continue
            share = config.memory.fixed_value
            if config.memory.combine == "gate":
                share = layer.reader.gate.logit[head].sigmoid()
            elif config.memory.combine == "content":
                gate = layer.reader.gate.linear
                share = (gate.weight[head] @ x + gate.bias[head]).sigmoid()
            far_mean = far_scores.softmax(0) @ far_values
            merged.append(share * far_mean + (1 - share) * (scores.softmax(0) @ near_values))
        outputs.append(layer.output.weight @ torch.cat(merged))
    return outputs, [(key.detach(), value.detach()) for key, value in new]


def memory_bias(
    layer: Attention, config: ModelConfig, written_since: list[int], token: int, head: int
) -> Tensor | float:
    """The biases of pairs after which so many others were written, for token number ``token``."""
    memory = config.memory
    if memory.position_bias == "none":
        return 0.0
    if memory.position_bias == "t5":
        buckets = [
            bucket_of(since + 1 + token, memory.bias_buckets, memory.bias_max_distance)
            for since in written_since
        ]
    else:
        buckets = [since * memory.bias_buckets // memory.size for since in written_since]
    return layer.reader.bias.table.weight[buckets, head]
