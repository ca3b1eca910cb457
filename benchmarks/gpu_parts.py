"""What ``gpu.py`` measures: parity, searches, training steps and a profile, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import Row, Shape, outcome, timed, wait, warnings_of_ours
from measure import summary
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from memorizing_transformers.memory import STORAGE_DTYPES, Memory, make_search
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.model.attention import Attention
from memorizing_transformers.model.flex import FEWEST_QUERIES, flex_failure
from memorizing_transformers.model.reader import MemoryReader
from memorizing_transformers.training.optimizers import OptimizerConfig, make_optimizer


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
            yield from _searches_of(shape, device, slots, dtype)


def _searches_of(shape: Shape, device: torch.device, slots: int, dtype: str) -> Iterator[Row]:
    chosen: Row = {"slots": slots, "dtype": dtype}
    lost: Row | None = None
    try:
        torch.manual_seed(0)
        size = (shape.rows, shape.heads, slots, shape.width)
        memory = Memory(*size, STORAGE_DTYPES[dtype], device)
        fill(memory, shape.segment)
        asked = queries_of(shape, device)
    except Exception as error:
        lost = {"kernel": None, "ms": None, "recall": outcome(error), "warnings": None}
    for name in ("exact", "bucketed"):
        chosen["search"] = name
        if lost is None:
            yield chosen | _search(shape, device, name, asked, memory)
        else:
            yield chosen | lost


def _search(shape: Shape, device: torch.device, name: str, asked: Tensor, memory: Memory) -> Row:
    search = make_search(name)
    ms: float | None = None
    recall: float | str
    with warnings_of_ours() as said:
        try:
            times = timed(partial(search, asked, memory, shape.top_k), device, shape.seconds)
            ms = 1e3 * summary(times)["median"]
            recall = measured_recall(search, asked, memory, shape.top_k, sample=64)
        except Exception as error:
            recall = outcome(error)
    kernel = kernel_of(search)
    return {"kernel": kernel, "ms": ms, "recall": recall, "warnings": "; ".join(said) or None}


def kernel_of(search: Any) -> str | None:
    """What a bucketed search last ran."""
    choice = getattr(search, "kernel", None)
    return choice and choice.name


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


def local_attention_of(step: Step, shape: Shape) -> str:
    """What its local attention runs, and if it is not FlexAttention, why."""
    found = next(x for x in step.net.modules() if isinstance(x, Attention))
    heads = found.num_heads, found.num_kv_heads, found.head_dim
    dtype = torch.bfloat16 if step.device.type == "cuda" else torch.float32
    if shape.segment < FEWEST_QUERIES:
        why: str | None = f"segments below {FEWEST_QUERIES}"
    else:
        why = flex_failure(step.inputs.device, dtype, *heads)
    return "flex" if why is None else f"not flex: {why}"


def measured_step(shape: Shape, device: torch.device, variant: Row) -> tuple[float, Row]:
    """Median seconds of a variant's training step, and what ran in it.

    What the step holds ends with this call, also where it fails: the next variant needs the room.
    """
    step = Step(shape, device, **variant)
    found = summary(timed(step, device, shape.seconds))["median"]
    readers = [x for x in step.net.modules() if isinstance(x, MemoryReader)]
    kernels = sorted({str(kernel_of(x.search)) for x in readers})
    kernel = ", ".join(kernels) if variant["slots"] else None
    return found, {"local attention": local_attention_of(step, shape), "search kernel": kernel}


def steps(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time and peak memory of a training step; each variant without memory comes first."""
    variants: list[Row] = [
        *({"slots": slots} for slots in (0, *shape.slots)),
        *({"slots": slots, "optimizer": "adafactor"} for slots in (0, shape.slots[0])),
        *({"slots": slots, "compiled": True} for slots in (0, *shape.slots[:2])),
        {"slots": shape.slots[0], "place": "cpu"},
    ]
    unknown = dict.fromkeys(("ms", "of no memory", "tokens/s", "local attention", "search kernel"))
    without: dict[tuple[str, bool], float] = {}
    for variant in variants:
        row = {"optimizer": "adamw", "compiled": False, "place": "model", **variant, **unknown}
        kind = (row["optimizer"], row["compiled"])
        with warnings_of_ours() as said:
            try:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                found, ran = measured_step(shape, device, variant)
                peak: float | str | None = None
                if device.type == "cuda":
                    peak = torch.cuda.max_memory_allocated(device) / 2**30
                if not row["slots"]:
                    without[kind] = found
                row |= {"ms": 1e3 * found, "tokens/s": shape.rows * shape.segment / found, **ran}
                row["of no memory"] = found / without[kind] if kind in without else None
            except Exception as error:
                peak = outcome(error)
        # Not within the above: until that block ends, its error holds what the step held.
        yield {**row, "peak GiB": peak, "warnings": "; ".join(said) or None}


def parity(shape: Shape, device: torch.device) -> Iterator[Row]:
    """How far searches on the device, and a step, are from the same on the CPU in fp32."""
    small = Shape(**{**asdict(shape), "rows": 2, "segment": min(64, shape.segment)})
    asked: dict[str, Callable[[], float]] = {
        f"{name}: share of the neighbours of the reference": partial(_same, small, device, name)
        for name in ("exact", "bucketed")
    }
    asked["loss on the device over loss on the CPU, less 1"] = partial(_loss_off, small, device)
    for what, figure in asked.items():
        found: float | str
        with warnings_of_ours() as said:
            try:
                found = figure()
            except Exception as error:
                found = outcome(error)
        yield {"what": what, "figure": found, "warnings": "; ".join(said) or None}


def _same(small: Shape, device: torch.device, name: str) -> float:
    torch.manual_seed(0)
    slots = min(small.slots[0], 4096)
    memory = Memory(2, small.heads, slots, small.width, torch.float32, "cpu")
    fill(memory, small.segment)
    asked = queries_of(small, torch.device("cpu"))
    there = Memory(2, small.heads, slots, small.width, torch.float32, device)
    there.write(memory.keys.to(device), memory.values.to(device))
    found = make_search(name)(asked.to(device), there, small.top_k).slots.cpu()
    true = make_search("reference")(asked, memory, small.top_k).slots
    return float((found[..., :, None] == true[..., None, :]).any(-1).float().mean())


def _loss_off(small: Shape, device: torch.device) -> float:
    losses = []
    for place in (torch.device("cpu"), device):
        step = Step(small, torch.device("cpu"), min(small.slots[0], 1024))
        step.net.to(place)
        bank = step.net.new_memory(2)
        bank.load(step.bank.tensors())
        with torch.no_grad():
            output = step.net.score(step.inputs.to(place), bank, step.targets.to(place))
            assert output.nll is not None
            losses.append(float(output.nll.mean()))
    return losses[1] / losses[0] - 1


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
