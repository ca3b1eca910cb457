"""Evaluates a checkpoint on a split: loss by document, time, recall of the search."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from memorizing_transformers.data.batch import IGNORE_INDEX, Batch
from memorizing_transformers.errors import UserError
from memorizing_transformers.memory import Memory, Neighbours, Search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model import MemorizingNet, ModelConfig
from memorizing_transformers.model.renamed import with_current_names
from memorizing_transformers.training.callbacks.timing import TimedSearch, wait_for
from memorizing_transformers.training.checkpoint.export import TOKENIZER_KEY, is_packed
from memorizing_transformers.training.checkpoint.folder import open_checkpoint
from memorizing_transformers.training.checkpoint.resume import ARCHITECTURE_KEY
from memorizing_transformers.training.optimizers import is_of_memory

PART_OF_READER = {
    "combine": "gate",
    "position_bias": "bias",
    "bias_buckets": "bias",
    "bias_max_distance": "bias",
    "match_length": "match",
}
"""By setting of the memory, the part of a reader whose weights mean something else under another
value, though names and shapes may be the same."""
ONLY_WITH = {"bias_buckets": ("t5", "learned-absolute"), "bias_max_distance": ("t5",)}
"""By setting, the position biases that it changes."""

RECALL_EVERY = 16
"""Recall is measured at one of 16 searches of a layer."""
RECALL_QUERIES = 16
"""The number of queries per row and key/value head whose recall is measured."""


def _of_another_meaning(
    names: Iterable[str], saved: dict[str, Any], ours: dict[str, Any]
) -> dict[str, list[str]]:
    """By setting that differs, the names of the weights that it gives another meaning.

    Args:
        names: of weights.
        saved: the architecture that they had; a setting that came later had its default.
        ours: the architecture of the network.
    """
    saved = {**ModelConfig().architecture(), **saved}
    found = {}
    for setting, part in PART_OF_READER.items():
        key = f"memory.{setting}"
        kind = ours.get("memory.position_bias")
        changes = kind in ONLY_WITH.get(setting, (kind,)) and saved[key] != ours.get(key)
        belongs = re.compile(rf"\.(memory_)?reader\.{part}\.")
        of_part = [name for name in names if changes and belongs.search(name)]
        if of_part:
            found[f"model.{key} = {ours.get(key)!r} (there: {saved[key]!r})"] = of_part
    return found


def load_weights(
    net: MemorizingNet, folder: Path, fresh_memory: bool, tokenizer: Any = None
) -> None:
    """Put a checkpoint's weights into a network, which may differ in its memory layers.

    Gates, biases of retrieved pairs and parts of a copy head that the network lacks are left out.

    Args:
        net: the network.
        folder: the checkpoint.
        fresh_memory: whether the memory's parameters that the checkpoint lacks, or that mean
            something else there, may keep their start.
        tokenizer: that of the data; None not to compare it with the checkpoint's.

    Raises:
        UserError: naming the weights that do not fit or the settings that give them another
            meaning, or because the token ids mean other text.
    """
    checkpoint = open_checkpoint(folder)
    packed = checkpoint.get(TOKENIZER_KEY)
    if packed is not None and tokenizer is not None and not is_packed(packed, tokenizer):
        raise UserError("from: the checkpoint has another tokenizer, so its ids mean other text")
    weights = checkpoint["state_dict"]
    saved = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
    saved = with_current_names(saved)
    own = net.state_dict()
    named = [name for name in own if name in saved]
    other = _of_another_meaning(named, checkpoint.get(ARCHITECTURE_KEY, {}), net.architecture())
    if other and not fresh_memory:
        remedy = "weights of the memory mean something else; let the variant train"
        raise UserError(f"from: {'; '.join(other)}: {remedy}")
    for name in {name for names in other.values() for name in names}:
        del saved[name]
    kept = {id(parameter) for parameter in net.memory_parameters()} if fresh_memory else set()
    excused = {name for name, parameter in net.named_parameters() if id(parameter) in kept}
    surplus = [n for n in saved if n not in own and not is_of_memory(n)]
    lacking = [name for name in own if name not in saved and name not in excused]
    misfit = [n for n in own if n in saved and saved[n].shape != own[n].shape]
    for what, names in (
        ("lacks", lacking),
        ("also has", surplus),
        ("has another shape of", misfit),
    ):
        if names:
            remedy = "let the variant train from the start"
            raise UserError(f"from: the checkpoint {what} {', '.join(names[:3])}; {remedy}")
    net.load_state_dict(saved, strict=False)


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
