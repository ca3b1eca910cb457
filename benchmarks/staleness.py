"""What stale pairs cost: drift by age, recall, and loss against a refreshed memory.

    python benchmarks/staleness.py --run runs/quickstart/version_0    # goes on from its weights
    python benchmarks/staleness.py --steps 1500 --rates 1e-2          # from scratch

Trains at several learning rates. At evenly spread steps the weights are frozen, and the next
segments of the same documents are read with the memory as training left it, refreshed, with old or
drifted pairs dropped, and with none. Then the same is trained again under each control of
staleness, and validated. From a run's weights the rate is constant; from scratch it follows the
config's schedule.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.data.plan import RowPlan
from memorizing_transformers.data.store import TokenStore
from memorizing_transformers.memory import MemoryBank, drop_drifted, make_search, refresh
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.callbacks.staleness_control import evaluating
from memorizing_transformers.training.export import load_model
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig

AHEAD = 8
"""Segments that are read with frozen weights."""
DROP_AFTER, DROP_BELOW = 8, 0.9
"""The bounds on age, in steps, and on drift, as a cosine, that are tried."""
STREAMS = ("training", "held out")
READ_WITH = ("stale", "refreshed", "young", "undrifted", "none")
CONTROLS: list[dict[str, Any]] = [
    {},
    {"refresh_every_n_steps": 8},
    {"drop_after_n_steps": DROP_AFTER},
]


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


def run(rate: float, given: argparse.Namespace, probes: list[int], **control: Any) -> dict:
    """Train, measure, validate."""
    seed_everything(given.seed, verbose=False)
    source = given.run / "config.yaml" if given.run else Path("configs/quickstart.yaml")
    config = yaml.safe_load(source.read_text())
    fields = config["data"] | ({"cache_dir": str(given.cache_dir)} if given.cache_dir else {})
    # Another order than the run's own, so that it does not read again what it has just read.
    data = DocumentDataModule(**fields | {"seed": given.seed + 1})
    model = {k: v for k, v in config["model"].items() if k in ModelConfig.__dataclass_fields__}
    memory = MemoryConfig(**model.pop("memory") | {"size": given.slots} | control)
    optimizer = dict(config["model"]["optimizer"]) | {"lr": rate}
    if given.run:
        optimizer |= {"schedule": "constant", "warmup_steps": 20}
    module = MemorizingLM(
        OptimizerConfig(**optimizer), staleness_every_n_steps=0, memory=memory, **model
    )
    if given.run:
        weights = load_model(given.run / "checkpoints" / "last.ckpt").state_dict()
        module.config.vocab_size = data.vocab_size
        module.net = Transformer(module.config)
        module.net.load_state_dict(weights)
    probe = FreezeAndRefresh(probes)
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }
    trainer = Trainer(**quiet, max_steps=given.steps, callbacks=[probe], gradient_clip_val=1.0)
    began = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - began - probe.seconds
    tester = Trainer(**quiet | {"limit_val_batches": given.val_batches})
    figures = tester.validate(module, datamodule=data, verbose=False)[0]
    return {
        "rate": rate,
        **control,
        "seconds": seconds,
        "validation_loss": figures["val/loss"],
        **({name: stream.summary() for name, stream in probe.streams.items()} if probes else {}),
    }


def mean(values: list[float]) -> str:
    """Mean and standard error."""
    tensor = torch.tensor(values)
    return f"{tensor.mean():+.4f} ± {tensor.std() / len(values) ** 0.5:.4f}"


def table_of_probes(results: list[dict[str, Any]], steps: int, parts: int) -> str:
    """Averages over each part of each training; losses of the first segment after freezing."""
    rows = []
    for result in results:
        for name, part in product(STREAMS, range(parts)):
            first, last = part * steps / parts, (part + 1) * steps / parts
            probes = [p for p in result[name]["probes"] if first < p["step"] <= last]
            averages = {
                key: sum(p[key] for p in probes) / len(probes)
                for key in ("rate", "age", "keys_cosine", "values_cosine", "recall")
            }
            stale = [p["stale"][0] for p in probes]
            rows.append(
                {
                    "documents": name,
                    "steps": f"{probes[0]['step']} to {probes[-1]['step']}",
                    "learning rate": f"{averages['rate']:.2g}",
                    "mean age": f"{averages['age']:.1f}",
                    "keys' cosine": f"{averages['keys_cosine']:.3f}",
                    "values' cosine": f"{averages['values_cosine']:.3f}",
                    "recall": f"{averages['recall']:.3f}",
                    "loss, stale": f"{sum(stale) / len(stale):.4f}",
                    **{
                        f"{other} - stale": mean([p[other][0] - p["stale"][0] for p in probes])
                        for other in READ_WITH[1:]
                    },
                }
            )
    return measure.table(rows)


def table_of_runs(results: list[dict[str, Any]]) -> str:
    """Validation after training under each control."""
    return measure.table(
        [
            {
                "learning rate": f"{result['rate']:g}",
                "control": next(
                    (f"{k}: {result[k]}" for c in CONTROLS for k in c if k in result), "-"
                ),
                "validation loss": f"{result['validation_loss']:.4f}",
                "CPU seconds": f"{result['seconds']:.0f}",
            }
            for result in results
        ]
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Drift and recall by age, and what staleness costs over the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    drift, recall, loss = figure.subplots(1, 3)
    for number, result in enumerate(results):
        for stream, style in zip(STREAMS, ("--", "-"), strict=True):
            measured = result[stream]
            look = {"label": f"{result['rate']:g}, {stream}", "color": f"C{number}", "ls": style}
            for axes, key in ((drift, "drift"), (recall, "recall")):
                axes.plot(list(measured[key]), list(measured[key].values()), **look)
            steps = [p["step"] for p in measured["probes"]]
            lost = [p["stale"][0] - p["refreshed"][0] for p in measured["probes"]]
            loss.plot(steps, lost, marker=".", **look)
    drift.set(xlabel="age in steps", ylabel="cosine of stored keys and today's")
    recall.set(xlabel="age of the true neighbour in steps", ylabel="share found")
    loss.set(xlabel="training step", ylabel="loss, stale - refreshed (nats per token)")
    loss.axhline(0, color="grey", linewidth=0.8)
    drift.legend(title="learning rate, documents")
    figure.savefig(path)


def main() -> None:
    """Parse, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run to go on from")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--probes", type=int, default=20, help="times to freeze and measure")
    parser.add_argument(
        "--controls", type=int, default=len(CONTROLS), help="of the list in this file, from none on"
    )
    parser.add_argument("--val_batches", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache_dir", type=Path, help="the config's own unless given")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    facts = measure.circumstances()
    probes = [given.steps * (turn + 1) // given.probes for turn in range(given.probes)]
    probed, trained = [], []
    for rate in given.rates:
        for control in CONTROLS[: given.controls]:
            trained.append(run(rate, given, [] if control else probes, **control))
            if not control:
                probed.append(trained[-1])
            parts = 1 if given.run else 3
            text = table_of_probes(probed, given.steps, parts) + "\n\n" + table_of_runs(trained)
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
            content = {"circumstances": facts, "settings": settings, "runs": trained}
            measure.save(given.out, "staleness", content, text)
            draw(probed, given.out / "staleness.png")


if __name__ == "__main__":
    main()
