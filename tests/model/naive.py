"""The model as one would explain it: per row, head and token, over lists, one number at a time.

Shares no code with the package but the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memorizing_transformers.model import ModelConfig, Transformer
from memorizing_transformers.model.attention import Attention

Found = list[list[tuple[Tensor, list[int]]]]
"""By token and head, the weights of what was retrieved and its places in the document."""


@dataclass
class Document:
    """What a row has read of its current document: by layer, a (key, value) of each token."""

    pairs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


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
        hidden = embedded = [model.embedding.weight[token] for token in ids[:length]]
        text = document.tokens + ids[:length].tolist()
        found: Found = []
        first_values: list[Tensor] = []
        for index, layer in enumerate(model.layers):
            if index and model.config.embedding_shortcut:
                hidden = [x + layer.shortcut * own for x, own in zip(hidden, embedded, strict=True)]
            past = document.pairs.setdefault(index, [])
            normed = [rms_norm(x, layer.attention_norm.weight) for x in hidden]
            attended, pairs, found_here = attention(
                layer.attention, model.config, index, normed, past, text, first_values
            )
            found = found_here or found
            first_values = first_values or [value for _, value in pairs]
            past.extend((key.detach(), value.detach()) for key, value in pairs)
            hidden = [x + y for x, y in zip(hidden, attended, strict=True)]
            norm, widen, _, narrow = layer.feed_forward
            power = 2 if model.config.activation == "relu2" else 1
            hidden = [
                x + narrow.weight @ (widen.weight @ rms_norm(x, norm.weight)).relu() ** power
                for x in hidden
            ]
        scale = model.config.d_model**-0.5
        last = [rms_norm(x, model.norm.weight) for x in hidden]
        row = [model.embedding.weight @ x * scale for x in last]
        held = min(len(document.tokens), model.config.memory.size)
        if model.copy_head is not None and held:
            first = len(document.tokens) - held
            row = [
                copied(
                    model, row[i], last[i], text[: len(document.tokens) + i + 1], text, first, one
                )
                for i, one in enumerate(found)
            ]
        document.tokens = text
        padding = [torch.zeros(len(model.embedding.weight))] * (len(ids) - length)
        outputs.append(torch.stack(row + padding))
    return torch.stack(outputs)


def attention(
    layer: Attention,
    config: ModelConfig,
    index: int,
    hidden: list[Tensor],
    past: list[tuple[Tensor, Tensor]],
    text: list[int],
    first_values: list[Tensor],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Found]:
    """A layer's attention of one row's tokens, their pairs, each (G, D), and what was retrieved."""
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_width
    keys = [(layer.key.weight @ x).view(kv_heads, width) for x in hidden]
    values = [(layer.value.weight @ x).view(kv_heads, width) for x in hidden]
    if config.value_residual and index:
        part = layer.value_share
        values = [
            (1 - part) * own + part * first for own, first in zip(values, first_values, strict=True)
        ]
    if config.qk_norm:
        keys = [torch.stack([unit(key) for key in token]) for token in keys]
    new = list(zip(keys, values, strict=True))
    cached = past[-config.xl_cache :] if config.xl_cache else []
    reached = past[-config.memory.size :] if config.memory.size else []
    if index not in config.memory_layers:
        reached = []
    outputs, found = [], []
    first = len(past) - len(reached)
    for token, x in enumerate(hidden):
        found.append([])
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

            if config.memory.temperature:
                query = query * layer.reader.log_temperature[head].exp()
            far_scores = torch.stack([key[group] for key, _ in reached]) @ query
            places = sorted(range(len(reached)), key=far_scores.tolist().__getitem__, reverse=True)
            places = places[: config.memory.top_k * config.memory.candidates]
            written_since = [len(reached) - 1 - place for place in places]
            far_scores = far_scores[places] + memory_bias(layer, config, written_since, token, head)
            lengths = [0] * len(places)
            if config.memory.match_length:
                here, longest = len(past) + token, config.memory.match_length
                for shift in (0, 1):
                    matched = [
                        match(text, first + place - shift, here, first, longest) for place in places
                    ]
                    far_scores = far_scores + layer.reader.match.table[shift, matched, head]
                    lengths = [max(pair) for pair in zip(lengths, matched, strict=True)]
            kept = list(range(len(places)))
            if config.memory.candidates > 1:
                order = far_scores.tolist()
                kept = sorted(kept, key=order.__getitem__, reverse=True)[: config.memory.top_k]
            places, lengths = [places[i] for i in kept], [lengths[i] for i in kept]
            far_scores = far_scores[kept]
            attended = far_scores.softmax(0)
            found[-1].append((attended, [first + place for place in places]))
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
            elif config.memory.combine == "evidence":
                gate = layer.reader.gate
                a, c, e, f = gate.evidence[:, head]
                mean = (attended.detach() * torch.tensor(lengths)).sum()
                logit = gate.bias[head] + gate.hidden[head] @ x + a * far_scores.logsumexp(0)
                logit = logit - c * scores.logsumexp(0) + e * far_scores.max() + f * mean
                share = logit.sigmoid()
            far_mean = far_scores.softmax(0) @ far_values
            merged.append(share * far_mean + (1 - share) * (scores.softmax(0) @ near_values))
        outputs.append(layer.output.weight @ torch.cat(merged))
    return outputs, new, found if reached else []


def match(text: list[int], then: int, now: int, first: int, longest: int) -> int:
    """How many tokens up to ``then`` equal those up to ``now``, none before ``first``."""
    count = 0
    while count < longest and then - count >= first and text[then - count] == text[now - count]:
        count += 1
    return count


def copied(
    model: Transformer,
    logits: Tensor,
    hidden: Tensor,
    known: list[int],
    text: list[int],
    first: int,
    found: list[tuple[Tensor, list[int]]],
) -> Tensor:
    """Log probabilities with what the copy head adds, by the definition of the mixture."""
    sources, own = model.copy_head.sources, logits.softmax(0)
    expected = own.detach().log()
    total = own
    if "neighbours" in sources:
        source = sources["neighbours"]
        for head, (weights, places) in enumerate(found):
            nearest = model.config.memory.copy_top_k
            heaviest = weights.argsort(descending=True)[:nearest].tolist()
            weights, places = weights[heaviest], [places[index] for index in heaviest]
            for kind in (0, 1):
                logit = source.log_odds[kind, head] + source.hidden[kind] @ hidden
                logit = logit + source.sharpness[kind, head] * weights.max().detach()
                for weight, place in zip(weights, places, strict=True):
                    one = torch.zeros_like(own)
                    one[text[place + kind]] = 1.0
                    total = total + logit.exp() * weight * one
    if "repeats" in sources:
        source, longest = sources["repeats"], sources["repeats"].search.longest
        here = len(known) - 1
        ends = {place: match(known, place, here, first, longest) for place in range(first, here)}
        chosen: list[tuple[int, int]] = []
        for order, above in ((8, longest + 1), (4, 8), (2, 4)):
            newest = [p for p in sorted(ends, reverse=True) if ends[p] >= order]
            newest = newest[: source.search.per_order]
            chosen += [(p, ends[p]) for p in newest if ends[p] < above]
        if chosen:
            scores = torch.stack(
                [
                    source.by_length[length]
                    - source.slope * torch.tensor(1 + (here - place) / 64).log()
                    + source.toward_likely * expected[known[place + 1]]
                    for place, length in chosen
                ]
            )
            share = torch.zeros_like(own)
            for (place, _), weight in zip(chosen, scores.softmax(0), strict=True):
                one = torch.zeros_like(own)
                one[known[place + 1]] = 1.0
                share = share + weight * one
            best = int(share.argmax())
            count = torch.tensor(1.0 + int((share > 0).sum())).log()
            features = torch.stack([share.max(), expected[best], expected.max(), count])
            logit = source.log_odds[max(length for _, length in chosen)]
            logit = logit + features @ source.features + source.hidden @ hidden
            total = total + logit.exp() * share
    # Equal to the fast model's logits up to a constant, which the caller's comparison removes.
    return total.log()


def memory_bias(
    layer: Attention, config: ModelConfig, written_since: list[int], token: int, head: int
) -> Tensor | float:
    """The biases of pairs after which so many others were written, for token number ``token``."""
    memory = config.memory
    if memory.position_bias == "none":
        return 0.0
    if memory.position_bias == "log":
        distances = torch.tensor([since + 1.0 + token for since in written_since])
        return -layer.reader.bias.slope[head].exp() * (1 + distances / 64).log()
    if memory.position_bias == "t5":
        buckets = [
            bucket_of(since + 1 + token, memory.bias_buckets, memory.bias_max_distance)
            for since in written_since
        ]
    else:
        buckets = [since * memory.bias_buckets // memory.size for since in written_since]
    return layer.reader.bias.table.weight[buckets, head]
