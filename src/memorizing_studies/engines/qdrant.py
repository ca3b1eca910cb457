"""Keys of a library in Qdrant, a vector database that spreads collections over machines.

Values, tokens and the keys that are scored again stay in the files of the library; the database
gives slots alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models

from memorizing_transformers.generation.library import Library
from memorizing_transformers.memory import Memory

AT_ONCE = 4096
"""Keys that one request uploads."""


class QdrantIndex:
    """The ``PairIndex`` of one layer of a library; each head has a collection of its own.

    Args:
        client: a client of the database; ``QdrantClient(":memory:")`` needs no server.
        name: of the library; collections are called ``NAME-layer-head``.
        layer: its number.
        memory: what the library holds of the layer.
    """

    def __init__(self, client: QdrantClient, name: str, layer: int, memory: Memory) -> None:
        self.client = client
        self.collections = [f"{name}-{layer}-{head}" for head in range(memory.keys.shape[1])]
        self.memory = memory
        for collection in self.collections:
            if not client.collection_exists(collection):
                width = memory.keys.shape[3]
                vectors = models.VectorParams(size=width, distance=models.Distance.DOT)
                client.create_collection(collection, vectors_config=vectors)
        self.count = min(client.count(one).count for one in self.collections)
        """Pairs that it knows: those in slots 0 to count - 1."""

    def add(self) -> None:
        """Upload the pairs of the library that are not there yet; can be called again."""
        used = int(self.memory.used[0])
        for head, collection in enumerate(self.collections):
            for begin in range(self.count, used, AT_ONCE):
                slots = range(begin, min(used, begin + AT_ONCE))
                keys = self.memory.keys_at((0, head, slice(slots.start, slots.stop)))
                self.client.upload_collection(collection, keys.numpy(), ids=slots, wait=True)
        self.count = used

    def nearest(self, head: int, queries: NDArray[Any], number: int) -> NDArray[Any]:
        """Slots (n, number) int64 with the largest inner products; -1 for none."""
        asked = [models.QueryRequest(query=query.tolist(), limit=number) for query in queries]
        answers = self.client.query_batch_points(self.collections[head], asked)
        slots = np.full((len(queries), number), -1, dtype=np.int64)
        for row, answer in enumerate(answers):
            found = [point.id for point in answer.points]
            slots[row, : len(found)] = found
        return slots


def from_qdrant(library: Library, client: QdrantClient, name: str) -> None:
    """Upload a library's new pairs, and let sessions that attach to it from now on ask Qdrant.

    Args:
        library: of which sessions read.
        client: of the database.
        name: of the library there.
    """

    def index(layer: int, memory: Memory) -> QdrantIndex:
        made = QdrantIndex(client, name, layer, memory)
        with torch.no_grad():
            made.add()
        return made

    library.engine = index
