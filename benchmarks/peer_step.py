"""The training step of ``memorizing-transformers-pytorch``, for ``step.py``, which starts this.

Runs in the peer's own environment. Reads commands from standard input, one JSON a line, and answers
each with one JSON line: train, fill, load, recall, step, quit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import step_shape as shape
import torch
from memorizing_transformers_pytorch import MemorizingTransformer


def build(folder: Path, slots: int) -> MemorizingTransformer:
    """The peer's model in the shape of the benchmark."""
    torch.manual_seed(0)
    return MemorizingTransformer(
        num_tokens=shape.VOCABULARY,
        dim=shape.D_MODEL,
        depth=shape.LAYERS,
        heads=shape.HEADS,
        dim_head=shape.HEAD_WIDTH,
        memorizing_layers=shape.MEMORY_LAYER + 1,
        max_knn_memories=slots,
        num_retrieved_memories=shape.TOP_K,
        xl_max_memories=shape.XL_CACHE,
        knn_memories_directory=str(folder / f"peer-memmap-{slots}"),
        pad_id=-100,
    )


class Peer:
    """The peer's model with its memories, each full at its size.

    Args:
        folder: where what was trained and filled lies.
        busy: measure processor time rather than wall time.
    """

    def __init__(self, folder: Path, busy: bool) -> None:
        self.folder = folder
        self.clock = time.process_time if busy else time.perf_counter
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype("int64"))
        self.full: dict[int, dict[str, Any]] = {}

    def segment(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (rows, N)."""
        stop = start + shape.SEGMENT
        return self.tokens[:, start:stop], self.tokens[:, start + 1 : stop + 1]

    def train(self, steps: int) -> dict[str, Any]:
        """Train from the start, with a memory that the peer wipes whenever it is full."""
        net = build(self.folder, shape.TRAINING_SLOTS)
        optimizer = torch.optim.AdamW(net.parameters(), lr=shape.TRAINING_LR)
        memories, cache, losses = net.create_knn_memories(batch_size=shape.ROWS), None, []
        for step in range(steps):
            inputs, targets = self.segment(step * shape.SEGMENT)
            loss, cache = net(inputs, memories, xl_memories=cache, labels=targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        torch.save(net.state_dict(), self.folder / "peer.pt")
        parameters = sum(weight.numel() for weight in net.parameters())
        return {"parameters": parameters, "loss": float(np.mean(losses[-20:] or [np.nan]))}

    @torch.no_grad()
    def fill(self, start: int, slots: list[int]) -> dict[str, Any]:
        """Read on until the memory holds each of ``slots`` pairs a row, and save it there."""
        net = build(self.folder, max(slots) + shape.SEGMENT)
        net.load_state_dict(torch.load(self.folder / "peer.pt", weights_only=True))
        memories, cache = net.create_knn_memories(batch_size=shape.ROWS), None
        (memory,) = memories
        while memory.db_offsets[0] < max(slots):
            inputs, targets = self.segment(start)
            start += shape.SEGMENT
            _, cache = net(inputs, memories, xl_memories=cache, labels=targets)
            held = int(memory.db_offsets[0])
            if held in slots:
                for row, knn in enumerate(memory.knns):
                    faiss.write_index(knn.index, str(self.folder / f"peer-{held}-{row}.faiss"))
                np.save(self.folder / f"peer-{held}.npy", memory.db[:, :held])
                saved = {"cache": cache, "start": start}
                torch.save(saved, self.folder / f"peer-{held}.pt")
        return {}

    def load(self, slots: int) -> dict[str, Any]:
        """Make ready to step with a memory of ``slots``."""
        net = build(self.folder, slots + shape.SEGMENT)
        net.load_state_dict(torch.load(self.folder / "peer.pt", weights_only=True))
        memories = net.create_knn_memories(batch_size=shape.ROWS)
        (memory,) = memories
        stored = np.load(self.folder / f"peer-{slots}.npy")
        memory.db[:, :slots] = stored
        indexes = []
        for row, knn in enumerate(memory.knns):
            indexes.append(faiss.read_index(str(self.folder / f"peer-{slots}-{row}.faiss")))
            knn.is_trained = True
        saved = torch.load(self.folder / f"peer-{slots}.pt", weights_only=True)
        self.full[slots] = {
            "net": net,
            "optimizer": torch.optim.AdamW(net.parameters(), lr=shape.MEASURING_LR),
            "memories": memories,
            "keys": stored[:, :, 0],
            "indexes": indexes,
            **saved,
        }
        return {}

    def refill(self, slots: int) -> None:
        """Hold exactly ``slots`` pairs: a step adds some, and one more would wipe the index."""
        (memory,) = self.full[slots]["memories"]
        memory.db_offsets[:] = slots
        for knn, index in zip(memory.knns, self.full[slots]["indexes"], strict=True):
            knn.index = faiss.clone_index(index)
            knn.ids = np.arange(slots, dtype=np.int32)

    def step(self, slots: int, bf16: bool = False) -> dict[str, Any]:
        """One training step; its seconds and loss."""
        state = self.full[slots]
        self.refill(slots)
        net, optimizer = state["net"], state["optimizer"]
        inputs, targets = self.segment(state["start"])
        begun = self.clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, cache = net(inputs, state["memories"], xl_memories=state["cache"], labels=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds = self.clock() - begun
        state["start"] += shape.SEGMENT
        state["cache"] = cache
        return {"seconds": seconds, "loss": loss.item()}

    @torch.no_grad()
    def recall(self, slots: int) -> dict[str, Any]:
        """Share of the true neighbours that the index finds for the next segment's queries.

        A found pair counts where its score reaches that of the last true neighbour.
        """
        state = self.full[slots]
        self.refill(slots)
        (memory,) = state["memories"]
        asked: list[np.ndarray] = []
        search = memory.search

        def noted(queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            asked.append(queries.numpy().reshape(shape.ROWS, -1, shape.HEAD_WIDTH))
            return search(queries, *args, **kwargs)

        memory.search = noted
        inputs, targets = self.segment(state["start"])
        state["net"](inputs, state["memories"], xl_memories=state["cache"], labels=targets)
        memory.search = search
        hits, wanted = 0, 0
        for queries, keys, index in zip(asked[0], state["keys"], state["indexes"], strict=True):
            queries, keys = np.ascontiguousarray(queries), np.ascontiguousarray(keys)
            metric = faiss.METRIC_INNER_PRODUCT
            truth, _ = faiss.knn(queries, keys, shape.TOP_K, metric=metric)
            found, _ = index.search(queries, shape.TOP_K)
            hits += int((found >= truth[:, -1:] - 1e-5).sum())
            wanted += truth.size
        return {"recall": hits / wanted}


def main() -> None:
    """Answer commands until told to quit."""
    given = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(given["threads"])
    faiss.omp_set_num_threads(given["threads"])
    peer = Peer(Path(given["folder"]), given["busy"])
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            break
        try:
            answer = getattr(peer, name)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
