"""What the hooks of all layers share while a pretrained model reads a segment.

Shapes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..memory import MemoryBank, MemoryView, OpenCache, Pairs, PlacedMemory, Readable, XLCache
from ..model.reader import Retrieval


@dataclass
class Segment:
    """What one forward pass reads and what it leaves to be committed."""

    memories: dict[int, PlacedMemory | MemoryView]
    caches: dict[int, XLCache]
    keeps: bool = False
    """Whether a backward pass may compute layers again after the next commit."""
    pairs: dict[int, Pairs] = field(default_factory=dict)
    """By layer, keys at position 0 and values."""
    retrievals: dict[int, Retrieval] = field(default_factory=dict)
    seen: dict[int, Readable] = field(default_factory=dict)
    """By layer, the memory as this segment's queries see it."""
    length: int = 0
    """Tokens of the complete segment, if it is read in parts; 0 for those that are read now."""
    before: dict[int, OpenCache] = field(default_factory=dict)
    """By layer, what the next part sees before it, keys at their positions."""

    def take(self, rows: Tensor, bank: MemoryBank) -> Segment:
        """One whose row ``i`` continues as row ``rows[i]`` of this one would."""
        taken = Segment(dict(bank.memories), dict(bank.caches), length=self.length)
        taken.before = {layer: cache.take(rows) for layer, cache in self.before.items()}
        for layer, seen in self.seen.items():
            owners = [seen.owner(row) for row in rows.tolist()]
            taken.seen[layer] = MemoryView(seen.base, owners)
        return taken
