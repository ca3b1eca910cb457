"""The hook: attention of a pretrained model that also reads a memory and an XL cache.

Transformers calls one function for the attention of all families that its interface supports, with
queries and keys after rotation and normalisation. So nothing here belongs to one family.

Shapes: B rows, N segment, W cached tokens, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError
from ..memory import (
    Memory,
    MemoryView,
    OpenCache,
    PlacedMemory,
    Readable,
    XLCache,
)
from ..model.local_attention import local_attention
from ..model.reader import MemoryReader
from .rotation import RotaryCalls, Rotation
from .segment import Segment

NAME = "memorizing"
"""The hook's name among the attention functions of transformers."""


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """By layer, the self-attention modules of a model of transformers.

    Raises:
        ConfigError: where its family's attention cannot be reached.
    """

    def is_attention(module: nn.Module) -> bool:
        return hasattr(module, "layer_idx") and "ttention" in type(module).__name__

    found = {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if is_attention(module) and not any(map(is_attention, list(module.modules())[1:]))
    }
    kind: Any = getattr(model, "config", None)
    # A model of peft wraps one of transformers.
    core: Any = getattr(model, "get_base_model", lambda: model)()
    able = isinstance(core, PreTrainedModel) and core._can_set_attn_implementation()
    if not found or not able or getattr(kind, "is_encoder_decoder", False):
        name = getattr(kind, "model_type", type(model).__name__)
        remedy = (
            "this family does not compute attention through the attention interface of "
            "transformers, which a memory needs; take a decoder of another family, such as llama, "
            "qwen3, gemma3, mistral, gpt_neox, phi3 or gpt2"
        )
        raise ConfigError("memorize", name, remedy)
    return found


class LayerHook:
    """What one attention module knows of memory; a plain attribute of the module, not a child.

    Args:
        attention: the module.
        calls: what the model asked its rotary modules.
        window: largest distance of two tokens that the model was trained on.
        distance: whether retrieved keys are at their true distance, at most that; else at the
            segment's start.
    """

    def __init__(
        self, attention: nn.Module, calls: RotaryCalls, window: int, distance: bool
    ) -> None:
        kind: Any = attention.config
        self.implementation = kind._attn_implementation
        own: Any = copy.copy(kind)
        own._attn_implementation = NAME
        attention.config = own
        self.layer: int = attention.layer_idx  # type: ignore[assignment]
        self.calls, self.window, self.distance = calls, window, distance
        self.segment: Segment | None = None
        self.rotation: Rotation | None = None
        self.rotates = True
        """Whether the layer rotates its keys, if it is given angles."""
        self.hidden: Tensor | None = None
        attention.register_forward_pre_hook(self._look, with_kwargs=True)
        attention.memory_hook = self  # type: ignore[assignment]

    def _look(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.segment is None:
            return
        self.hidden = args[0] if args else kwargs["hidden_states"]
        angles = kwargs.get("position_embeddings")
        self.rotation = None
        if angles is not None and self.rotates:
            self.rotation = Rotation(attention, angles, self.calls.asked(angles))

    def plain(self, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's own attention function."""
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        return function(attention, *args, **kwargs)

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, G, W + N, D) with the cache, and its places (B, W) to leave out."""
        assert self.segment is not None
        cache = self.segment.before.get(self.layer)
        if cache is None:
            cache = self._turned(k, v)
        if cache is None:
            return k, v, None
        keys, values = torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2)
        hidden = ~cache.valid()
        if self.segment.length:
            cache.append(k, v)
        return keys, values, hidden if hidden.shape[1] else None

    def _turned(self, k: Tensor, v: Tensor) -> OpenCache | None:
        """The XL cache with keys at their positions, like k and v; with room for a segment that is
        read in parts."""
        assert self.segment is not None
        cache, room = self.segment.caches.get(self.layer), self.segment.length
        if cache is None:
            if not room:
                return None
            before = self.segment.before[self.layer] = OpenCache.after(None, (k, v), room)
            return before
        keys, values = cache.keys.to(k), cache.values.to(v)
        if self.rotation is not None:
            places = torch.arange(-cache.size, 0, device=k.device).expand(k.shape[0], -1)
            keys = self.rotation.to(keys, places).to(k)
        turned = OpenCache(keys, values, cache.valid(), room)
        if room:
            self.segment.before[self.layer] = turned
        return turned

    def memory(self) -> Readable | None:
        """The memory as this segment sees it: keys at their positions, cached pairs left out."""
        assert self.segment is not None
        if self.layer not in self.segment.seen and self.layer in self.segment.memories:
            memory = self.segment.memories[self.layer]
            cache = self.segment.caches.get(self.layer)
            seen: Readable
            if isinstance(memory, MemoryView):
                # Rows that share a memory have read the same, so any of them speaks for it.
                reader = {owner: row for row, owner in enumerate(memory.rows)}
                owners = [*reader]
                own = memory.base.take(torch.tensor(owners))
                if cache is not None:
                    cache = cache.take(torch.tensor([*reader.values()]))
                seen = self._seen(own, cache, self.segment.keeps)  # type: ignore[arg-type]
                seen = MemoryView(seen, [owners.index(owner) for owner in memory.rows])
            else:
                seen = self._seen(memory, cache, self.segment.keeps)
            self.segment.seen[self.layer] = seen
        return self.segment.seen.get(self.layer)

    def far(self, queries: Tensor) -> Tensor:
        """Queries (B, H, N, D) for keys at position 0 that are as far away as the model knows."""
        if self.rotation is None or not self.distance:
            return queries
        # To turn the query forth is to turn every key back.
        places = torch.full(queries.shape[::2], self._first(), device=queries.device)
        return self.rotation.to(queries, places)

    def _first(self) -> int:
        """The largest distance of a key from the segment's first token."""
        count = self.segment.length or self.hidden.shape[1]  # type: ignore[union-attr]
        return max(self.window - count, 0)

    @torch.no_grad()
    def _seen(self, memory: PlacedMemory, cache: XLCache | None, keeps: bool) -> Memory:
        seen = copy.copy(memory)
        used = memory.max_fill
        seen.keys = torch.zeros(memory.keys.shape, dtype=torch.float32, device=memory.device)
        seen.keys[:, :, :used] = memory.keys_at((slice(None), slice(None), slice(used)))
        seen.key_scales = None
        if keeps:
            seen.values = memory.values.clone()
            if memory.value_scales is not None:
                seen.value_scales = memory.value_scales.clone()
        for name in ("written", "origin", "oldest"):
            setattr(seen, name, getattr(memory, name).clone())
        if self.rotation is not None and self.distance and used:
            places = memory.positions[:, :used] - memory.read[:, None]
            places = places.clamp(min=-self._first(), max=0)
            seen.keys[:, :, :used] = self.rotation.to(seen.keys[:, :, :used], places)
        if cache is not None:
            recent = memory.places >= (memory.read - cache.length.to(memory.device))[:, None]
            hidden = (recent & memory.valid()).sum(1)
            seen.oldest.copy_(memory.written - memory.fill)
            seen.written.sub_(hidden)
        return seen


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, window: int | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last N of S tokens, with all that families add to it.

    Args:
        q: (B, H, N, D) scaled queries.
        k: (B, G, S, D) keys.
        v: (B, G, S, D) values.
        hidden: (B, W) cached places that no query may see, or None.
        window: number of last tokens that a query sees, itself among them; None for all.
        cap: bound of the scores by tanh, or None.

    Returns:
        output (B, H, N, D) and log mass (B, H, N), fp32.
    """
    repeats, (segment, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(repeats, 1).float(), v.repeat_interleave(repeats, 1).float()
    place = torch.arange(keys, device=q.device)
    away = place[keys - segment :, None] - place
    allowed = away >= 0
    if window is not None:
        allowed = allowed & (away < window)
    allowed = allowed[None].expand(q.shape[0], -1, -1)
    if hidden is not None:
        past = F.pad(hidden, (0, keys - hidden.shape[1]))
        allowed = allowed & ~past[:, None]
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.mT
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        mass = scores.logsumexp(-1)
        return (scores - mass[..., None]).exp() @ v, mass


def attend_with_memory(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; shapes as the interface has them.

    Args:
        attention: the module.
        query: (B, H, N, D).
        key: (B, G, N, D).
        value: (B, G, N, D).
        attention_mask: of the model's own implementation; only used without a bank.
        scaling: factor of the scores.
        kwargs: what families add: ``sliding_window``, ``softcap``, ``s_aux`` (sink logits).

    Returns:
        output (B, N, H, D), and no weights.
    """
    hook: LayerHook = attention.memory_hook  # type: ignore[assignment]
    segment = hook.segment
    if segment is None:
        plain = hook.plain(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return plain
    queries = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    back = key if hook.rotation is None else hook.rotation.back(key)
    segment.pairs[hook.layer] = (back.detach(), value.detach())
    keys, values, hidden = hook.cached(key, value)
    window, cap, sinks = (kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    memory = hook.memory()
    reader: MemoryReader | None = getattr(attention, "memory_reader", None)
    if (window is None or keys.shape[2] <= window) and cap is None:
        near = torch.zeros(query.shape[1], 1, device=query.device)
        wanted = memory is not None or sinks is not None
        local, mass = local_attention(queries, keys, values, near, hidden, wanted)
    else:
        local, mass = softmax_attention(queries, keys, values, hidden, window, cap)
    if sinks is not None:
        assert mass is not None
        whole = torch.logaddexp(mass, sinks.float()[:, None])
        local, mass = local * (mass - whole).exp()[..., None].to(local), whole
    if memory is not None:
        assert reader is not None
        asked = queries.to(memory.device)
        far = None if memory.library is None else hook.far(asked)
        local, found = reader(asked, local, mass, hook.hidden, memory, far=far)
        segment.retrievals[hook.layer] = found
    return local.to(value.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_with_memory)
