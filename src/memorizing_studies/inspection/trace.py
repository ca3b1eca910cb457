"""One reading of a document, segment by segment, and all that the memory layers did in it.

Shapes: L tokens of the document, N segment, A memory layers, H query heads, K neighbours, R the few
of them that are kept, E edges of distance.

Everything is filed under the token that was *predicted*: entry ``j`` belongs to token ``j`` of the
document, whose prediction the model made while it read token ``j - 1``. The query stood at
``j - 1``; a retrieved pair at position ``p`` was computed from token ``p``, at the distance
``(j - 1) - p`` behind the query. Nothing predicts token 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.memory import Memory, MemoryBank
from memorizing_transformers.model import Retrieval, Transformer
from memorizing_transformers.pretrained.memorized import MemorizedModel

NOT_FOUND = -1
"""The position of a neighbour that is not there, because the memory still held too few pairs."""


@dataclass
class HeadUse:
    """How each head of each memory layer used the memory, over all tokens and all K neighbours."""

    edges: NDArray[np.float64]
    """(E,) edges of the bins of distance, in tokens."""
    by_distance: NDArray[np.float64]
    """(A, H, E - 1) softmax weight that fell on each distance."""
    queries: NDArray[np.int64]
    """(A,) queries that found something."""
    share: NDArray[np.float64]
    """(A, H) summed share of the layer's output that came from the memory."""
    spread: NDArray[np.float64]
    """(A, H) summed effective number of neighbours: the exponential of the weights' entropy."""
    on_target: NDArray[np.float64]
    """(A, H) summed weight on pairs of a token equal to the one predicted."""
    before_target: NDArray[np.float64]
    """(A, H) summed weight on pairs whose *following* token equals the one predicted."""

    def mean(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """(A, H) a sum per query that found something; 0 where none did."""
        return total / np.maximum(self.queries, 1)[:, None]


@dataclass
class Trace:
    """What one reading recorded."""

    size: int
    """Slots of the memory; 0 where it was switched off."""
    layers: tuple[int, ...]
    """The memory layers, ascending; none where the memory was off."""
    nats: NDArray[np.float32]
    """(L,) negative log-likelihood of each token; 0 for token 0, which nothing predicts."""
    positions: NDArray[np.int32]
    """(A, H, R, L) position in the document of each kept neighbour, heaviest first, or -1."""
    weights: NDArray[np.float32]
    """(A, H, R, L) its softmax weight among all K neighbours; 0 where there is none."""
    shares: NDArray[np.float32]
    """(A, H, L) share of the layer's output that came from the memory."""
    use: HeadUse
    copied: NDArray[np.float32] | None = None
    """(L,) weight of copied tokens in the prediction; None where the model copies none."""
    repeated: NDArray[np.int32] | None = None
    """(L,) tokens back from each token to the one that followed the latest of the longest
    repetitions of the text before it; 0 where there is none, None where the model does not look."""

    @property
    def name(self) -> str:
        """``off``, or the size."""
        return str(self.size) if self.size else "off"

    @property
    def bits(self) -> NDArray[np.float64]:
        """(L,) the loss in bits."""
        return self.nats / np.log(2.0)

    @property
    def mean_nats(self) -> float:
        """Loss per predicted token."""
        return float(self.nats[1:].mean(dtype=np.float64))

    def distances(self) -> NDArray[np.int64]:
        """(A, H, R, L) tokens between the query and each kept neighbour; 0 where there is none."""
        here = np.arange(self.nats.shape[0]) - 1
        return np.where(self.positions == NOT_FOUND, 0, here - self.positions)


def distance_edges(length: int, per_octave: int = 2) -> NDArray[np.float64]:
    """Edges from 1 to at least ``length``, ``per_octave`` bins for each doubling."""
    octaves = int(np.ceil(np.log2(max(length, 2))))
    return np.asarray(2.0 ** (np.arange(octaves * per_octave + 1) / per_octave))


def new_trace(model: Transformer | MemorizedModel, size: int, length: int, top: int) -> Trace:
    """An empty record of a reading of ``length`` tokens."""
    layers = model.config.memory_layers if size else ()
    heads = (len(layers), model.config.num_heads)
    edges = distance_edges(length)
    head = getattr(model, "copy_head", None) if size else None
    repeats = head is not None and "repeats" in head.sources
    return Trace(
        size=size,
        layers=layers,
        nats=np.zeros(length, dtype=np.float32),
        positions=np.full((*heads, top, length), NOT_FOUND, dtype=np.int32),
        weights=np.zeros((*heads, top, length), dtype=np.float32),
        shares=np.zeros((*heads, length), dtype=np.float32),
        copied=None if head is None else np.zeros(length, dtype=np.float32),
        repeated=np.zeros(length, dtype=np.int32) if repeats else None,
        use=HeadUse(
            edges=edges,
            by_distance=np.zeros((*heads, len(edges) - 1)),
            queries=np.zeros(len(layers), dtype=np.int64),
            share=np.zeros(heads),
            spread=np.zeros(heads),
            on_target=np.zeros(heads),
            before_target=np.zeros(heads),
        ),
    )


def record(
    trace: Trace, number: int, retrieval: Retrieval, memory: Memory, tokens: Tensor, start: int
) -> None:
    """File what one memory layer retrieved for the segment that begins at ``start``.

    Must run before the segment is committed, while the slots still hold what was retrieved.

    Args:
        trace: the record.
        number: which of the trace's memory layers.
        retrieval: of one row.
        memory: that row's memory.
        tokens: (L,) the complete document, on the memory's device.
        start: the segment's first token.
    """
    valid, share = retrieval.valid[0], retrieval.share[0].float().to(retrieval.valid.device)
    slots = retrieval.slots[0].masked_fill(~valid, 0)
    weights = retrieval.weights[0].float().masked_fill(~valid, 0.0)
    positions = memory.positions[0, slots].long()
    # Through wrap-around and all, the ring must still know which token a pair was made of.
    assert torch.equal(memory.token_ids[0, slots][valid].long(), tokens[positions[valid]])
    segment = valid.shape[1]
    predicted = slice(start + 1, start + 1 + segment)

    top = trace.positions.shape[2]
    heaviest, order = weights.masked_fill(~valid, -1.0).topk(top, dim=-1)
    kept = positions.gather(-1, order).masked_fill(heaviest < 0, NOT_FOUND)
    trace.positions[number, :, :, predicted] = kept.transpose(1, 2).cpu().numpy()
    trace.weights[number, :, :, predicted] = heaviest.clamp(min=0).transpose(1, 2).cpu().numpy()
    trace.shares[number, :, predicted] = share.cpu().numpy()

    use, found = trace.use, valid.any(-1)
    here = torch.arange(start, start + segment, device=positions.device)
    distance = (here[:, None] - positions).cpu().numpy()
    for head, (away, weight) in enumerate(zip(distance, weights.cpu().numpy(), strict=True)):
        use.by_distance[number, head] += np.histogram(away, use.edges, weights=weight)[0]
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    target = tokens[start + 1 : start + 1 + segment, None]
    use.queries[number] += int(found[0].sum())
    use.share[number] += (share * found).sum(-1).cpu().numpy()
    use.spread[number] += (entropy.exp() * found).sum(-1).cpu().numpy()
    use.on_target[number] += (weights * (tokens[positions] == target)).sum((1, 2)).cpu().numpy()
    after = tokens[positions + 1] == target
    use.before_target[number] += (weights * after).sum((1, 2)).cpu().numpy()


def record_copies(
    trace: Trace, model: Transformer, bank: MemoryBank, inputs: Tensor, copied: Tensor, start: int
) -> None:
    """File what was copied in the segment that begins at ``start``, before it is committed.

    Args:
        trace: the record.
        model: with a copy head.
        bank: of one row.
        inputs: (1, n) the segment.
        copied: (1, n) weight of copied tokens.
        start: the segment's first token.
    """
    predicted = slice(start + 1, start + 1 + inputs.shape[1])
    assert trace.copied is not None
    trace.copied[predicted] = copied[0].float().cpu().numpy()
    if trace.repeated is not None:
        head: Any = model.copy_head
        found = head.sources["repeats"].search(inputs, bank.memories[trace.layers[-1]])
        lengths, distances = found.longest()
        # What followed lies as far before the predicted token as the repetition before the query.
        trace.repeated[predicted] = distances[0].masked_fill(lengths[0] == 0, 0).cpu().numpy()


@torch.inference_mode()
def read_document(
    model: Transformer | MemorizedModel,
    ids: NDArray[np.int64],
    segment: int,
    size: int,
    top: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Trace:
    """Read a document as validation does and record what happens.

    The bank is new and belongs to this reading alone; the model's weights do not change.

    Args:
        model: in evaluation mode.
        ids: (L,) the document.
        segment: tokens N read at once.
        size: slots of the memory; 0 switches it off and leaves the XL cache as it is.
        top: neighbours R kept of each head and query, at most ``top_k``.
        advance: called after each segment with the tokens read.

    Raises:
        ConfigError: where there is no room for the memory.
    """
    tokens = torch.from_numpy(ids).to(next(model.parameters()).device)
    trace = new_trace(model, size, len(ids), top)
    try:
        bank = model.new_memory(1, size=size)
    except (RuntimeError, TypeError) as error:
        # Torch has no error of its own for what cannot be allocated, or not even be counted.
        remedy = "there is no room for so many slots; give fewer"
        raise ConfigError("memory_sizes", size, remedy) from error
    placed = {layer: tokens.to(memory.device) for layer, memory in bank.memories.items()}
    for start in range(0, len(ids) - 1, segment):
        # The document's last token predicts nothing.
        inputs = tokens[start : min(start + segment, len(ids) - 1)]
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        output = model.score(inputs[None], bank, targets[None])
        assert output.nll is not None
        trace.nats[start + 1 : start + 1 + len(inputs)] = output.nll[0].cpu().numpy()
        for number, layer in enumerate(trace.layers):
            memory = bank.memories[layer]
            record(trace, number, output.retrievals[layer], memory, placed[layer], start)
        if trace.copied is not None:
            record_copies(trace, model, bank, inputs[None], output.copied, start)  # type: ignore[arg-type]
        bank.commit(output.pairs, token_ids=inputs[None])
        advance(len(inputs))
    return trace
