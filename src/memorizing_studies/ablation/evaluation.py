"""Evaluates a checkpoint on a split: loss by document, time, recall of the search."""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from memorizing_transformers.data.batch import IGNORE_INDEX, Batch
from memorizing_transformers.memory import Memory, Neighbours, Search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.training.callbacks.timing import TimedSearch, wait_for

from .taken_weights import load_weights

RECALL_EVERY = 16
"""Recall is measured at one of 16 searches of a layer."""
RECALL_QUERIES = 16
"""The number of queries per row and key/value head whose recall is measured."""


class MeasuredSearch(TimedSearch):
    """A search that measures its time and, on a sample of its queries, its recall.

    Args:
        search: the search.
    """

    def __init__(self, search: Search) -> None:
        super().__init__(search)
        self.recall_seconds = 0.0
        """The time that measuring recall took; not part of ``seconds``."""
        self.recalls: list[float] = []
        self._calls = 0

    def __call__(self, queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
        found = super().__call__(queries, memory, top_k)
        ended = time.perf_counter()
        # If there are at most top_k pairs, every search finds all of them.
        if int(memory.fill.max()) > top_k:
            if self._calls % RECALL_EVERY == 0:
                self.recalls.append(self._recall(queries, memory, found, top_k))
            self._calls += 1
        self.recall_seconds += time.perf_counter() - ended
        return found

    @staticmethod
    def _recall(queries: Tensor, memory: Memory, found: Neighbours, top_k: int) -> float:
        count = queries.shape[2]
        chosen = torch.linspace(0, count - 1, min(RECALL_QUERIES, count)).long()
        chosen = chosen.to(queries.device)
        sample = Neighbours(found.slots[:, :, chosen], found.valid[:, :, chosen])
        return measured_recall(lambda *_: sample, queries[:, :, chosen], memory, top_k)


class Evaluation(Callback):
    """Loads a checkpoint's weights, then measures the evaluation.

    Args:
        checkpoint: the checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.documents: dict[int, list[float]] = {}
        """By document: predicted tokens, summed loss in nats, CRC-32 of all its tokens."""
        self._searches: list[MeasuredSearch] = []
        self._seconds: list[float] = []
        self._began = 0.0

    def _start(self, trainer: Any, pl_module: Any) -> None:
        tokenizer = trainer.datamodule.text_tokenizer
        load_weights(pl_module.net, self.checkpoint, fresh_memory=False, tokenizer=tokenizer)
        for reader in pl_module.net.readers().values():
            reader.search = MeasuredSearch(reader.search)
            self._searches.append(reader.search)

    def _before(
        self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        wait_for(pl_module.device)
        self._began = self._clock()

    def _after(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wait_for(pl_module.device)
        self._seconds.append(self._clock() - self._began)
        losses, targets = outputs["nll"].double().sum(1).tolist(), batch.targets.cpu().numpy()
        inputs = batch.input_ids.cpu().numpy()
        for row, document in enumerate(batch.document.tolist()):
            if document < 0:
                continue
            read = targets[row][targets[row] != IGNORE_INDEX]
            # The first token of a document is never a target.
            first = [0, 0.0, zlib.crc32(inputs[row, :1].tobytes())]
            tokens, loss, checksum = self.documents.get(document, first)
            checksum = zlib.crc32(read.tobytes(), int(checksum))
            self.documents[document] = [tokens + len(read), loss + losses[row], checksum]

    def _clock(self) -> float:
        """Seconds, without the time that measuring recall took."""
        return time.perf_counter() - sum(search.recall_seconds for search in self._searches)

    on_test_start = on_validation_start = _start
    on_test_batch_start = on_validation_batch_start = _before
    on_test_batch_end = on_validation_batch_end = _after

    def figures(self) -> dict[str, float]:
        """Tokens, tokens per second, milliseconds of a batch and of its searches, recall."""
        tokens, seconds = sum(d[0] for d in self.documents.values()), sum(self._seconds)
        found = {
            "tokens": tokens,
            "eval_tokens_per_second": tokens / seconds,
            "eval_step_ms": 1000 * seconds / len(self._seconds),
        }
        if any(search.seconds for search in self._searches):
            searching = sum(search.seconds for search in self._searches)
            found["eval_search_ms"] = 1000 * searching / len(self._seconds)
        recalls = [recall for search in self._searches for recall in search.recalls]
        if recalls:
            found["recall"] = sum(recalls) / len(recalls)
        return found
