"""How much of the truth a search finds, measured while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gathered import dots, keys_of
from ..view import Readable
from .exact import ExactSearch
from .protocol import Neighbours, Search


@torch.no_grad()
def measured_recall(
    search: Search, queries: Tensor, memory: Readable, top_k: int, sample: int = 64
) -> float:
    """Share of the true neighbours that ``search`` finds, over a sample of queries.

    A found slot counts where its score reaches that of the last true neighbour: of two keys that
    score alike either will do.

    Args:
        search: what to measure.
        queries: (B, G, Q, D).
        memory: what is searched.
        top_k: neighbours a query.
        sample: queries of each row and head, evenly spread over Q.

    Returns:
        recall in [0, 1]; 1 where the memory is empty.
    """
    count = queries.shape[2]
    chosen = torch.linspace(0, count - 1, min(sample, count)).long().to(queries.device)
    asked = queries[:, :, chosen]
    truth = ExactSearch()(asked, memory, top_k)
    # Asked for all: how a search works may depend on their number.
    found = Neighbours(*(x[:, :, chosen] for x in search(queries, memory, top_k)))
    scores = []
    for slots, valid in (truth, found):
        safe = slots.masked_fill(~valid, 0)
        score = dots(asked.float(), keys_of(memory, safe, valid))
        scores.append(score.masked_fill(~valid, -torch.inf))
    wanted = truth.valid.sum(-1)
    least = scores[0].masked_fill(~truth.valid, torch.inf).amin(-1, keepdim=True)
    slack = 1e-5 * asked.float().norm(dim=-1, keepdim=True)
    hits = ((scores[1] >= least - slack) & found.valid).sum(-1).minimum(wanted)
    return float(hits.sum() / wanted.sum()) if wanted.any() else 1.0
