"""What stale pairs cost: drift by age, recall, and loss against a refreshed memory.

    python benchmarks/staleness.py                        # about 40 minutes on one CPU core
    python benchmarks/staleness.py --rates 1e-2 --steps 300 --refresh 0

Trains small models on Python's standard library at several learning rates. At evenly spread steps
the weights are frozen, and the next segments of the same documents are read three times: with the
memory as training left it, with the same memory refreshed, and with none. Then the same models are
trained again with a refresh every so many steps, and validated.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import measure
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.memory import MemoryBank, make_search, refresh
from memorizing_transformers.model import MemoryConfig, Transformer
from memorizing_transformers.training.callbacks.staleness_control import evaluating
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig

LAYER = 2
ROWS, SEGMENT = 8, 128
AHEAD = 8
"""Segments that are read with frozen weights."""


def copied(net: Transformer, bank: MemoryBank) -> MemoryBank:
    """The same memory, to be changed at will."""
    own = net.new_memory(bank.batch_size)
    own.load(bank.tensors())
    return own


def by_age(ages: Tensor, values: Tensor) -> dict[int, tuple[float, int]]:
    """By age in steps the sum of some values and their number."""
    sums = torch.zeros(int(ages.max()) + 1, dtype=torch.float64) if len(ages) else torch.zeros(0)
    sums.index_add_(0, ages, values.double())
    counts = ages.bincount()
    return {age: (float(sums[age]), int(n)) for age, n in enumerate(counts.tolist()) if n}


class FreezeAndRefresh(Callback):
    """Measures at some training steps, and changes nothing.

    Args:
        steps: when.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.records: list[dict[str, Any]] = []
        self.drift: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """By age in steps: sum of the cosines of stored and refreshed keys, and their number."""
        self.recall: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """By age of the true neighbour: how many the stale memory finds, of how many."""
        self.seconds = 0.0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is time."""
        if pl_module.global_step in self.steps:
            began = time.perf_counter()
            with evaluating(pl_module.net):
                self._measure(trainer.datamodule, pl_module)
            self.seconds += time.perf_counter() - began

    def _measure(self, data: DocumentDataModule, module: Any) -> None:
        net, step = module.net, module.global_step
        loader = SegmentLoader(data.train_store, data.plan("train"))
        batches = [loader.batch(0, step + ahead) for ahead in range(AHEAD)]
        stale = copied(net, module.banks["train"])
        stale.reset(batches[0].reset)
        fresh = copied(net, stale)
        began = time.perf_counter()
        refresh(net.encode, fresh, SEGMENT, step)
        seconds = time.perf_counter() - began
        record = {
            "step": step,
            "rate": module.optimizers().param_groups[0]["lr"],
            "refresh_seconds": seconds,
            **self._drift(stale, fresh, step),
            **self._recall(net, stale, fresh, batches[0].input_ids, step),
        }
        banks = {"stale": stale, "refreshed": fresh, "none": None}
        record.update({name: self._loss(net, bank, batches) for name, bank in banks.items()})
        self.records.append(record)

    def _drift(self, stale: MemoryBank, fresh: MemoryBank, step: int) -> dict[str, float]:
        old, new = stale.memories[LAYER], fresh.memories[LAYER]
        compared = new.valid() & (new.steps == step)
        ages = (step - old.steps)[compared].long()
        means = {}
        for name in ("keys", "values"):
            one, other = (getattr(m, name).transpose(1, 2)[compared] for m in (old, new))
            cosine = torch.cosine_similarity(one, other, dim=-1).mean(-1)
            means[f"{name}_cosine"] = float(cosine.mean())
            if name == "keys":
                self._add(self.drift, by_age(ages, cosine))
        return {**means, "age": float(ages.double().mean()), "oldest": int(ages.max())}

    def _recall(
        self, net: Transformer, stale: MemoryBank, fresh: MemoryBank, ids: Tensor, step: int
    ) -> dict[str, float]:
        queries = net(ids, stale).retrievals[LAYER].queries
        top_k, search = net.config.memory.top_k, make_search("exact")
        old, new = stale.memories[LAYER], fresh.memories[LAYER]
        found, truth = (search(queries, memory, top_k) for memory in (old, new))
        hit = torch.zeros_like(truth.valid)
        for place in range(top_k):
            same = (found.slots == truth.slots[..., place : place + 1]) & found.valid
            hit[..., place] = same.any(-1)
        row = torch.arange(ROWS)[:, None, None, None].expand_as(truth.slots)[truth.valid]
        ages = (step - old.steps[row, truth.slots[truth.valid]]).long()
        hits = hit[truth.valid]
        self._add(self.recall, by_age(ages, hits))
        best = truth.valid[..., 0]
        return {
            "recall": float(hits.double().mean()),
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
    def _add(total: dict[int, list[float]], new: dict[int, tuple[float, int]]) -> None:
        for age, (value, count) in new.items():
            total[age][0] += value
            total[age][1] += count


def run(rate: float, given: argparse.Namespace, probes: list[int], **memory: Any) -> dict[str, Any]:
    """Train, measure, validate."""
    seed_everything(given.seed, verbose=False)
    data = DocumentDataModule(
        tokenizer="bpe",
        batch_rows=ROWS,
        eval_rows=6,
        segment_length=SEGMENT,
        cache_dir=str(given.cache_dir),
    )
    module = MemorizingLM(
        OptimizerConfig(lr=rate),
        staleness_every_n_steps=0,
        d_model=128,
        num_layers=LAYER + 1,
        num_heads=4,
        relative_init=6.0,
        memory=MemoryConfig(size=given.slots, layers=[LAYER], **memory),
    )
    probe = FreezeAndRefresh(probes)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=given.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[probe],
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - began - probe.seconds
    tester = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    figures = tester.validate(module, datamodule=data, verbose=False)[0]
    return {
        "rate": rate,
        **memory,
        "seconds": seconds,
        "validation_loss": figures["val/loss"],
        "probes": probe.records,
        "drift": {age: total / n for age, (total, n) in sorted(probe.drift.items())},
        "recall": {age: total / n for age, (total, n) in sorted(probe.recall.items())},
    }


def thirds(result: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The probes of a run, averaged over each third of the training."""
    rows = []
    for third in range(3):
        part = [p for p in result["probes"] if third * steps < 3 * p["step"] <= (third + 1) * steps]
        if not part:
            continue
        lost = torch.tensor([p["stale"][0] - p["refreshed"][0] for p in part])
        mean = {
            key: sum(p[key] for p in part) / len(part)
            for key in ("rate", "age", "keys_cosine", "values_cosine", "recall")
        }
        rows.append(
            {
                "learning rate at most": f"{result['rate']:g}",
                "steps": f"{part[0]['step']} to {part[-1]['step']}",
                "learning rate": mean["rate"],
                "mean age": mean["age"],
                "keys' cosine": f"{mean['keys_cosine']:.4f}",
                "values' cosine": f"{mean['values_cosine']:.4f}",
                "recall": f"{mean['recall']:.3f}",
                **{
                    f"loss, {name}": f"{sum(p[name][0] for p in part) / len(part):.4f}"
                    for name in ("stale", "refreshed", "none")
                },
                "stale - refreshed": f"{lost.mean():+.4f} ± {lost.std() / len(part) ** 0.5:.4f}",
            }
        )
    return rows


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Drift and recall by age, and what staleness costs over the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    drift, recall, loss = figure.subplots(1, 3)
    for result in results:
        name = f"lr {result['rate']:g}"
        for axes, key in ((drift, "drift"), (recall, "recall")):
            axes.plot(list(result[key]), list(result[key].values()), label=name)
        steps = [p["step"] for p in result["probes"]]
        loss.plot(
            steps, [p["stale"][0] - p["refreshed"][0] for p in result["probes"]], "o-", label=name
        )
    drift.set(xlabel="age in steps", ylabel="cosine of stored keys and today's")
    recall.set(xlabel="age of the true neighbour in steps", ylabel="share found")
    loss.set(xlabel="training step", ylabel="loss, stale - refreshed (nats per token)")
    loss.axhline(0, color="grey", linewidth=0.8)
    drift.legend()
    figure.savefig(path)


def main() -> None:
    """Parse, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--probes", type=int, default=15, help="times to freeze and measure")
    parser.add_argument("--refresh", type=int, nargs="*", default=[8], help="steps; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache_dir", type=Path, default=Path("data/cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    facts = measure.circumstances()
    probes = [given.steps * (turn + 1) // given.probes for turn in range(given.probes)]
    results, trained = [], []
    for rate in given.rates:
        results.append(run(rate, given, probes))
        trained.append(results[-1])
        for every in filter(None, given.refresh):
            trained.append(run(rate, given, [], refresh_every_n_steps=every))
        compared = [
            {
                "learning rate at most": f"{r['rate']:g}",
                "refresh_every_n_steps": r.get("refresh_every_n_steps", 0),
                "validation loss": f"{r['validation_loss']:.4f}",
                "seconds of training": f"{r['seconds']:.0f}",
            }
            for r in trained
        ]
        rows = [row for result in results for row in thirds(result, given.steps)]
        text = measure.table(rows) + "\n\n" + measure.table(compared)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
        content = {"circumstances": facts, "settings": settings, "runs": trained}
        measure.save(given.out, "staleness", content, text)
        draw(results, given.out / "staleness.png")


if __name__ == "__main__":
    main()
