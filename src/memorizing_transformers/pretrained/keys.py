"""What is asked of a base before it gets a memory: which it is, and whether its keys can be turned.

Shapes: N segment, G key/value heads, D head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .hook import LayerHook
from .segment import Segment


def fingerprint_weights(weights: Mapping[str, Tensor]) -> str:
    """A name of weights: of all names and shapes, and of a sample of the numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def check_keys(
    base: nn.Module,
    hooks: Mapping[int, LayerHook],
    run: Callable[..., Any],
    vocabulary: int,
    count: int,
) -> dict[int, tuple[int, int]]:
    """By layer key/value heads G and width D, after a check that keys can be turned back.

    Args:
        base: the model.
        hooks: by layer; layers whose keys are not rotated are marked.
        run: reads tokens with the hooks on: (segment, ids, position_ids).
        vocabulary: ids that the model knows.
        count: tokens N to read.

    Raises:
        ConfigError: where the same tokens at other positions give other keys at position 0.
    """
    device = next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, count), generator=generator, device="cpu").to(device)
    places = torch.arange(count, device=device)[None]
    was = {module: module.training for module in base.modules()}
    base.eval()
    passes = []
    for offset in (0, 3):
        segment = Segment({}, {})
        run(segment, ids, position_ids=places + offset)
        passes.append((segment.pairs, {n: hook.rotation for n, hook in hooks.items()}))
    for module, mode in was.items():
        module.training = mode
    (first, turned), (second, _) = passes
    for layer, (keys, _) in first.items():
        other = second[layer][0]
        scale = keys.abs().max().clamp(min=1e-6)
        rotation = turned[layer]
        if rotation is None or (keys - other).abs().max() < 0.02 * scale:
            continue
        # A layer without rotation is given angles too, in some families.
        raw, again = rotation.to(keys, places), rotation.to(other, places + 3)
        if (raw - again).abs().max() > 0.02 * scale:
            name = base.config.model_type  # type: ignore[union-attr]
            remedy = f"the keys of layer {layer} cannot be turned back to position 0"
            raise ConfigError("memorize", name, remedy)
        hooks[layer].rotates = False
    return {layer: (keys.shape[1], keys.shape[3]) for layer, (keys, _) in first.items()}
