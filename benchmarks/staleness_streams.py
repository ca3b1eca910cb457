"""Streams of documents that are read along with a training, with stale memories and others."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.data.row_plan import RowPlan
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.memory import MemoryBank, drop_drifted, make_search, refresh
from memorizing_transformers.model import Transformer
from memorizing_transformers.training.callbacks.staleness_control import evaluating

AHEAD = 8
"""Segments that are read with frozen weights."""
DROP_AFTER, DROP_BELOW = 8, 0.9
"""The bounds on age, in steps, and on drift, as a cosine, that are tried."""
STREAMS = ("training", "held out")
READ_WITH = ("stale", "refreshed", "young", "undrifted", "none")


def copied(net: Transformer, bank: MemoryBank) -> MemoryBank:
    """The same memory, to be changed at will."""
    own = net.new_memory(bank.batch_size)
    own.load(bank.tensors())
    return own


class Stream:
    """Documents that are read in step with the training, and what was measured on them.

    Args:
        store: the documents.
        plan: which of them each row reads at each step.
    """

    def __init__(self, store: TokenStore, plan: RowPlan) -> None:
        self.loader = SegmentLoader(store, plan)
        self.drift: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """By age in steps: sum of the cosines of stored and refreshed keys, and their number."""
        self.recall: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """By age of the true neighbour: how many the stale memory finds, of how many."""
        self.probes: list[dict[str, Any]] = []

    def measure(self, net: Transformer, bank: MemoryBank, step: int) -> None:
        """Read on with frozen weights, from what a bank holds after a step."""
        segment = self.loader.plan.segment_length
        batches = [self.loader.batch(0, step + ahead) for ahead in range(AHEAD)]
        stale = copied(net, bank)
        stale.reset(batches[0].reset)
        fresh, young, undrifted = (copied(net, stale) for _ in range(3))
        began = time.process_time()
        refresh(net.encode, fresh, segment, step)
        seconds = time.process_time() - began
        for memory in young.memories.values():
            memory.drop_written_before(step - DROP_AFTER)
        drop_drifted(net.encode, undrifted, segment, DROP_BELOW)
        banks = dict(zip(READ_WITH, (stale, fresh, young, undrifted, None), strict=True))
        (layer,) = net.config.memory_layers
        held = stale.memories[layer].fill.sum()
        self.probes.append(
            {
                "step": step,
                "refresh_seconds": seconds,
                **self._drift(stale, fresh, layer, step),
                **self._recall(net, stale, fresh, layer, batches[0].input_ids, step),
                **{name: self._loss(net, bank, batches) for name, bank in banks.items()},
                "share_young": float(young.memories[layer].fill.sum() / held),
                "share_undrifted": float(undrifted.memories[layer].fill.sum() / held),
            }
        )

    def summary(self) -> dict[str, Any]:
        """The probes, and drift and recall by age over all of them."""
        by_age = {
            name: {age: total / count for age, (total, count) in sorted(ages.items())}
            for name, ages in (("drift", self.drift), ("recall", self.recall))
        }
        return {"probes": self.probes, **by_age}

    def _drift(
        self, stale: MemoryBank, fresh: MemoryBank, layer: int, step: int
    ) -> dict[str, float]:
        old, new = stale.memories[layer], fresh.memories[layer]
        compared = new.valid() & (new.steps == step)
        ages = (step - old.steps)[compared].long()
        cosines = {
            name: torch.cosine_similarity(
                *(getattr(memory, name).transpose(1, 2)[compared] for memory in (old, new)), dim=-1
            ).mean(-1)
            for name in ("keys", "values")
        }
        self._add(self.drift, ages, cosines["keys"])
        means = {f"{name}_cosine": float(cosine.mean()) for name, cosine in cosines.items()}
        return {**means, "age": float(ages.double().mean()), "oldest": int(ages.max())}

    def _recall(
        self,
        net: Transformer,
        stale: MemoryBank,
        fresh: MemoryBank,
        layer: int,
        ids: Tensor,
        step: int,
    ) -> dict[str, float]:
        """Share of the neighbours by today's keys that a search of the stale ones finds."""
        queries = net(ids, stale).retrievals[layer].queries
        top_k, search = net.config.memory.top_k, make_search("exact")
        old, new = stale.memories[layer], fresh.memories[layer]
        found, truth = (search(queries, memory, top_k) for memory in (old, new))
        hit = torch.zeros_like(truth.valid)
        for place in range(top_k):
            same = (found.slots == truth.slots[..., place : place + 1]) & found.valid
            hit[..., place] = same.any(-1)
        row = torch.arange(len(ids))[:, None, None, None].expand_as(truth.slots)[truth.valid]
        ages = (step - old.steps[row, truth.slots[truth.valid]]).long()
        self._add(self.recall, ages, hit[truth.valid])
        best = truth.valid[..., 0]
        return {
            "recall": float(hit[truth.valid].double().mean()),
            "recall_of_the_best": float(hit[..., 0][best].double().mean()),
        }

    @staticmethod
    def _loss(net: Transformer, bank: MemoryBank | None, batches: list[Any]) -> list[float]:
        """Mean loss of the first segment, and of all."""
        own = None if bank is None else copied(net, bank)
        sums, counts = [], []
        for batch in batches:
            if own is not None:
                own.reset(batch.reset)
            output = net(batch.input_ids, own)
            sums.append(float(net.loss(output.logits, batch.targets, "sum")))
            counts.append(int(batch.mask.sum()))
            if own is not None:
                own.commit(output.pairs, batch.mask, batch.input_ids)
        return [sums[0] / counts[0], sum(sums) / sum(counts)]

    @staticmethod
    def _add(total: dict[int, list[float]], ages: Tensor, values: Tensor) -> None:
        for age in ages.unique().tolist():
            own = values[ages == age].double()
            total[age][0] += float(own.sum())
            total[age][1] += len(own)


class FreezeAndRefresh(Callback):
    """Measures at some training steps, and changes nothing.

    On the training documents a refreshed pair comes from weights that have meanwhile been trained
    on that very token, which no pair of a new document does. So a second bank reads validation
    documents along with the training, each segment with the weights of its step.

    Args:
        steps: when.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.streams: dict[str, Stream] = {}
        self.held_out: MemoryBank | None = None
        self.seconds = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay out what is read."""
        data = trainer.datamodule
        stores = {"training": data.train_store, "held out": data.validation_store}
        for name, store in stores.items():
            plan = RowPlan(store.lengths, data.batch_rows, data.segment_length, data.seed)
            self.streams[name] = Stream(store, plan)

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read a segment of the held-out documents as training reads its own."""
        if not self.steps:
            return
        began = time.process_time()
        net, step = pl_module.net, pl_module.global_step
        if self.held_out is None:
            self.held_out = net.new_memory(trainer.datamodule.batch_rows)
        own = self.streams["held out"].loader.batch(0, step)
        self.held_out.reset(own.reset)
        with evaluating(net):
            pairs = net(own.input_ids, self.held_out).pairs
        self.held_out.commit(pairs, own.mask, own.input_ids, step)
        self.seconds += time.process_time() - began

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is time."""
        if pl_module.global_step not in self.steps:
            return
        began = time.process_time()
        banks = {"training": pl_module.banks["train"], "held out": self.held_out}
        with evaluating(pl_module.net):
            for name, stream in self.streams.items():
                stream.measure(pl_module.net, banks[name], pl_module.global_step)
                stream.probes[-1]["rate"] = pl_module.optimizers().param_groups[0]["lr"]
        self.seconds += time.process_time() - began
