"""What ``gpu.py`` measures: parity, searches, training steps and a profile, on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import summary
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from memorizing_transformers.memory import STORAGE_DTYPES, Memory, make_search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.optimizers import OptimizerConfig, make_optimizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of what is measured; the defaults are those of the paper's larger model."""

    rows: int = 32
    heads: int = 8
    segment: int = 512
    width: int = 128
    layers: int = 12
    d_model: int = 1024
    vocabulary: int = 32_000
    top_k: int = 32
    slots: tuple[int, ...] = (8_192, 65_536, 262_144)
    seconds: float = 4.0
    """Time for one figure, after two warm-up runs."""


TINY = Shape(2, 2, 16, 16, 2, 32, 64, 4, (64, 128), 0.05)
"""For a rehearsal on a CPU."""


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call: at least three, and as many as fit into ``seconds``."""
    for _ in range(2):
        call()
    wait(device)
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < 50):
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def fill(memory: Memory, segment: int) -> None:
    """Random keys of unit length and random values, until every slot is taken."""
    place = memory.device
    rows, groups, width = memory.keys.shape[0], memory.keys.shape[1], memory.keys.shape[-1]
    for _ in range(-(-memory.size // segment)):
        keys = F.normalize(torch.randn(rows, groups, segment, width, device=place), dim=-1)
        memory.write(keys, torch.randn_like(keys))


def queries_of(shape: Shape, device: torch.device) -> Tensor:
    """(B, G, N, D) queries as the model has them: unit length, times a scale of 8."""
    made = torch.randn(shape.rows, shape.heads, shape.segment, shape.width, device=device)
    return 8 * F.normalize(made, dim=-1)


def searches(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time and recall of each search for one segment of every row, by size and storage type."""
    for slots in shape.slots:
        for dtype in STORAGE_DTYPES:
            try:
                yield from _searches_of(shape, device, slots, dtype)
            except torch.OutOfMemoryError:
                full = {"search": "does not fit", "ms": None, "recall": None}
                yield {"slots": slots, "dtype": dtype, **full}


def _searches_of(shape: Shape, device: torch.device, slots: int, dtype: str) -> Iterator[Row]:
    torch.manual_seed(0)
    size = (shape.rows, shape.heads, slots, shape.width)
    memory = Memory(*size, STORAGE_DTYPES[dtype], device)
    fill(memory, shape.segment)
    asked = queries_of(shape, device)
    for name in ("exact", "bucketed"):
        search = make_search(name)
        times = timed(partial(search, asked, memory, shape.top_k), device, shape.seconds)
        recall = measured_recall(search, asked, memory, shape.top_k, sample=64)
        ms = 1e3 * summary(times)["median"]
        yield {"slots": slots, "dtype": dtype, "search": name, "ms": ms, "recall": recall}


def make_net(shape: Shape, slots: int, place: str, compiled: bool) -> Transformer:
    """The model; without slots it has no memory."""
    memory = MemoryConfig(
        size=slots or shape.slots[0],
        top_k=shape.top_k,
        layers=None if slots else [],
        search="bucketed",
        dtype="bfloat16",
        device=place,  # type: ignore[arg-type]
    )
    return Transformer(
        ModelConfig(
            vocab_size=shape.vocabulary,
            d_model=shape.d_model,
            num_layers=shape.layers,
            num_heads=shape.heads,
            head_dim=shape.width,
            xl_cache=shape.segment,
            compile=compiled,
            memory=memory,
        )
    )


class Step:
    """A training step of 32 rows in bf16-mixed, with a full memory.

    Args:
        shape: sizes.
        device: of the model.
        slots: of the memory; 0 for none.
        optimizer: a name of ``model.optimizer.name``.
        place: ``model.memory.device``.
        compiled: ``model.compile``.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        slots: int,
        optimizer: str = "adamw",
        place: str = "model",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.net = make_net(shape, slots, place, compiled).to(device)
        self.bank = self.net.new_memory(shape.rows)
        for memory in self.bank.memories.values():
            fill(memory, shape.segment)
        self.optimizer = make_optimizer(self.net, OptimizerConfig(optimizer, lr=1e-4))
        tokens = torch.randint(shape.vocabulary, (shape.rows, shape.segment + 1), device=device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def __call__(self) -> None:
        """Forward, loss, backward, optimiser step and commit."""
        mixed = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
            output = self.net.score(self.inputs, self.bank, self.targets)
            assert output.nll is not None
            loss = output.nll.mean()
        loss.backward()
        self.bank.commit(output.pairs, token_ids=self.inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds_of_step(shape: Shape, device: torch.device, variant: dict[str, Any]) -> float:
    """Median of a variant's training step.

    What the step holds ends with this call, also where it fails: the next variant needs the room.
    """
    return summary(timed(Step(shape, device, **variant), device, shape.seconds))["median"]


def steps(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time and peak memory of a training step; each variant without memory comes first."""
    variants: list[dict[str, Any]] = [
        *({"slots": slots} for slots in (0, *shape.slots)),
        *({"slots": slots, "optimizer": "adafactor"} for slots in (0, shape.slots[0])),
        *({"slots": slots, "compiled": True} for slots in (0, *shape.slots[:2])),
        {"slots": shape.slots[0], "place": "cpu"},
    ]
    without: dict[tuple[str, bool], float] = {}
    for variant in variants:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        chosen = {"optimizer": "adamw", "compiled": False, "place": "model", **variant}
        unknown = dict.fromkeys(("ms", "of no memory", "tokens/s"))
        full: Row | None = None
        try:
            found = seconds_of_step(shape, device, variant)
        except torch.OutOfMemoryError:
            full = {**chosen, **unknown, "peak GiB": "does not fit"}
        if full is not None:  # not above: until that block ends, its error holds the step
            yield full
            continue
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        kind = (chosen["optimizer"], chosen["compiled"])
        without.setdefault(kind, found)
        yield {
            **chosen,
            "ms": 1e3 * found,
            "of no memory": found / without[kind],
            "tokens/s": shape.rows * shape.segment / found,
            "peak GiB": peak,
        }


def parity(shape: Shape, device: torch.device) -> Iterator[Row]:
    """How far searches on the device, and a step, are from the same on the CPU in fp32."""
    slots = min(shape.slots[0], 4096)
    small = Shape(**{**asdict(shape), "rows": 2, "segment": min(64, shape.segment)})
    for name in ("exact", "bucketed"):
        torch.manual_seed(0)
        memory = Memory(2, small.heads, slots, small.width, torch.float32, "cpu")
        fill(memory, small.segment)
        asked = queries_of(small, torch.device("cpu"))
        there = Memory(2, small.heads, slots, small.width, torch.float32, device)
        there.write(memory.keys.to(device), memory.values.to(device))
        found = make_search(name)(asked.to(device), there, small.top_k).slots.cpu()
        true = make_search("reference")(asked, memory, small.top_k).slots
        share = (found[..., :, None] == true[..., None, :]).any(-1).float().mean()
        yield {"what": f"{name}: share of the neighbours of the reference", "figure": float(share)}
    losses = []
    for place in (torch.device("cpu"), device):
        step = Step(small, torch.device("cpu"), min(slots, 1024))
        step.net.to(place)
        bank = step.net.new_memory(2)
        bank.load(step.bank.tensors())
        with torch.no_grad():
            output = step.net.score(step.inputs.to(place), bank, step.targets.to(place))
            assert output.nll is not None
            losses.append(float(output.nll.mean()))
    yield {
        "what": "loss on the device over loss on the CPU, less 1",
        "figure": losses[1] / losses[0] - 1,
    }


def where_time_goes(shape: Shape, device: torch.device) -> str:
    """The profiler's table of one training step with the second largest memory."""
    step = Step(shape, device, shape.slots[-2])
    for _ in range(2):
        step()
    wait(device)
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as found:
        step()
        wait(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=30))
