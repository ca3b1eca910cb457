"""What stale pairs cost: drift by age, recall, and loss against a refreshed memory.

    python benchmarks/staleness.py --run runs/quickstart/version_0    # continues from its weights
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
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from staleness_streams import DROP_AFTER, READ_WITH, STREAMS, FreezeAndRefresh

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig

CONTROLS: list[dict[str, Any]] = [
    {},
    {"refresh_every_n_steps": 8},
    {"drop_after_n_steps": DROP_AFTER},
]
"""Of staleness, none first."""


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
    module = MemorizingLM(OptimizerConfig(**optimizer), memory=memory, **model)
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
    parts = 1 if given.run else 3
    if not parts <= given.probes <= given.steps:
        parser.error(f"--probes {given.probes}: give {parts} to --steps ({given.steps})")
    facts = measure.circumstances()
    probes = [given.steps * (turn + 1) // given.probes for turn in range(given.probes)]
    probed, trained = [], []
    for rate in given.rates:
        for control in CONTROLS[: given.controls]:
            trained.append(run(rate, given, [] if control else probes, **control))
            if not control:
                probed.append(trained[-1])
            text = table_of_probes(probed, given.steps, parts) + "\n\n" + table_of_runs(trained)
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
            content = {"circumstances": facts, "settings": settings, "runs": trained}
            measure.save(given.out, "staleness", content, text)
            draw(probed, given.out / "staleness.png")


if __name__ == "__main__":
    main()
