"""Finds the layers of a pretrained model that use what was read before: those with induction heads.

A random text is read twice in a row. An induction head attends from a token to the one that
followed the same token the first time (Olsson et al., 2022, arXiv 2209.11895). A memory is worth
most in the layers that have such heads.

Shapes: H query heads, G key/value heads, S tokens, D head width.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .hook import attention_modules

PROBE = "memorizing-probe"
TOKENS = 200
"""Random tokens that are read twice."""
LEAST = 0.25
"""A layer is taken if its best head puts this part of its attention on the right token."""
SHOWN = 0.1
"""The same, for a layer to be in the table."""


def attention_ahead(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Each head's mean attention (H,) in the second reading to the token after the earlier one.

    Args:
        query: (1, H, S, D) of a text that is its first half twice.
        key: (1, G, S, D).
        scaling: factor of the scores.
        softcap: bound of the scores, or None.
    """
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).float()
    count = query.shape[2] // 2
    scores = query[0, :, count:].float() @ keys[0].mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(2 * count, device=query.device)
    scores = scores.masked_fill(place > place[count:, None], -torch.inf)
    # The query at count + i reads token i for the second time; token i + 1 followed it.
    return scores.softmax(-1).diagonal(1, 1, 2)[:, :count].mean(-1)


def _probe(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    own: Any = attention
    own.induction = attention_ahead(query, key, scaling, kwargs.get("softcap"))
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(own.probed_implementation, eager)
    return plain(attention, query, key, value, mask, **kwargs)


AttentionInterface.register(PROBE, _probe)
AttentionMaskInterface.register(PROBE, sdpa_mask)


@torch.no_grad()
def induction_scores(model: nn.Module, seed: int = 0) -> dict[int, Tensor]:
    """By layer, each head's mean attention (H,) to the token after the earlier occurrence.

    Args:
        model: a decoder of transformers.
        seed: of the random tokens.

    Raises:
        ConfigError: where its family's attention cannot be reached.
    """
    modules = attention_modules(model)
    kind: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    window = getattr(kind, "max_position_embeddings", None) or 2 * TOKENS
    count = min(TOKENS, window // 2)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(kind.vocab_size, (1, count), generator=generator, device="cpu")
    home = next(model.parameters()).device
    kept = {layer: module.config for layer, module in modules.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in modules.values():
            own: Any = copy.copy(module.config)
            module.probed_implementation = own._attn_implementation
            own._attn_implementation = PROBE
            module.config = own
        model(ids.repeat(1, 2).to(home), use_cache=False)
        return {layer: module.induction.cpu() for layer, module in modules.items()}  # type: ignore
    finally:
        for layer, module in modules.items():
            module.config = kept[layer]
            for name in ("induction", "probed_implementation"):
                module.__dict__.pop(name, None)
        for module, mode in modes.items():
            module.training = mode


def induction_layers(model: nn.Module, least: float = LEAST, show: bool = True) -> list[int]:
    """The layers with an induction head; where there is none, the layer with the best head.

    Args:
        model: a decoder of transformers.
        least: part of a head's attention from which it counts.
        show: whether to print the table.
    """
    scores = induction_scores(model)
    best = {layer: float(values.max()) for layer, values in scores.items()}
    chosen = [layer for layer, value in best.items() if value >= least]
    chosen = chosen or [max(best, key=lambda layer: best[layer])]
    if show:
        title = f"Attention of induction heads (memory layers have a head of {least} or more)"
        table = Table("layer", "best heads", "memory", title=title)
        for layer, values in scores.items():
            if best[layer] < SHOWN and layer not in chosen:
                continue
            heads = ", ".join(f"{value:.2f}" for value in values.sort(descending=True).values[:4])
            table.add_row(str(layer), heads, "yes" if layer in chosen else "")
        Console().print(table)
    return chosen
