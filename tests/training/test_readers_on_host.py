"""All that reads retrievals, with the memory on the host and the model elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from two_devices import AWAY, CPU, send_away, two_devices

from memorizing_studies.inspection.trace import read_document
from memorizing_transformers.data.batch import Batch
from memorizing_transformers.model import Transformer
from memorizing_transformers.training.callbacks.retrieval import (
    RetrievalHistograms,
    RetrievalLogging,
    retrieval_recall,
)
from memorizing_transformers.training.callbacks.samples import describe
from memorizing_transformers.training.callbacks.staleness import StalenessLogging
from memorizing_transformers.training.callbacks.staleness_control import StalenessControl
from memorizing_transformers.training.checkpoint.rank_state import RankPart
from memorizing_transformers.training.module import MemorizingLM

ROWS, SEGMENT, SEGMENTS, LAYER = 2, 8, 8, 1


class Recorder:
    """A logger, and a TensorBoard writer, that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen |= metrics

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        self.seen[tag] = values


def make_module(combine: str) -> MemorizingLM:
    torch.manual_seed(0)
    memory = {
        "size": 40,
        "top_k": 4,
        "layers": [LAYER],
        "device": "cpu",
        "combine": combine,
        "search": "bucketed",
        "drop_below_cosine": 0.5,
        "refresh_every_n_steps": 1,
    }
    module = MemorizingLM(
        vocab_size=23, d_model=16, num_layers=2, num_heads=2, xl_cache=8, memory=memory
    )
    module.net = Transformer(module.config)
    return module


def batch_of(ids: Tensor, number: int) -> Batch:
    start = torch.full((ROWS,), number * SEGMENT, device=ids.device)
    return Batch(
        input_ids=ids,
        targets=ids.roll(-1, 1),
        reset=start == 0,
        document=torch.zeros_like(start),
        position=start,
        text_bytes=torch.full_like(start, SEGMENT),
        text_tokens=torch.full_like(start, SEGMENT),
    )


def observed(module: MemorizingLM, observer: Any, *arguments: Any) -> dict[str, Any]:
    logger = Recorder()
    observer.module, observer.trainer = module, SimpleNamespace(loggers=[logger])
    observer.observe(*arguments, 3)
    return logger.seen


def predictions(module: MemorizingLM, batch: Any, bank: Any, output: Any) -> dict[str, Any]:
    predicted = module.predict_step(batch, 0)
    assert {field.device for field in predicted["best"][LAYER]} == {CPU}
    return predicted


def histograms(module: MemorizingLM, batch: Any, bank: Any, output: Any) -> dict[str, Any]:
    writer = Recorder()
    RetrievalHistograms()._draw([writer], {}, bank, output, 3)
    return writer.seen


def sample(module: MemorizingLM, batch: Any, bank: Any, output: Any) -> str:
    return describe(bank.memories[LAYER], output.retrievals[LAYER], [0] * SEGMENT, 0, str)


def controlled(module: MemorizingLM, batch: Any, bank: Any, output: Any) -> dict[str, Tensor]:
    plugin = SimpleNamespace(forward_context=ExitStack)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, precision_plugin=plugin)
    module.banks["train"] = bank
    StalenessControl().on_train_batch_start(trainer, module, batch, 0)
    return bank.memories[LAYER].tensors()


def traced(module: MemorizingLM, batch: Any, bank: Any, output: Any) -> list[Any]:
    ids = torch.randint(0, 23, (60,), generator=torch.Generator().manual_seed(5)).numpy()
    read: Any = read_document.__wrapped__  # the second device knows no inference mode
    trace = read(module.net.eval(), ids, SEGMENT, 24, 2)
    use = trace.use
    return [trace.nats, trace.weights, trace.positions, trace.shares, use.spread, use.on_target]


READERS: dict[str, Callable[..., Any]] = {
    "predictions": predictions,
    "scalars": lambda module, *rest: observed(module, RetrievalLogging(), *rest),
    "staleness": lambda module, *rest: observed(module, StalenessLogging(), *rest),
    "recall": lambda module, batch, bank, output: retrieval_recall(
        bank.memories[LAYER], output.retrievals[LAYER]
    ),
    "histograms": histograms,
    "samples": sample,
    "staleness control": controlled,
    "checkpoint": lambda module, batch, bank, output: {
        name: x for name, x in RankPart(0, bank).tensors.items() if "random" not in name
    },
    "inspect": traced,
}


def plain(found: Any) -> Any:
    """The same with tensors as they are on the CPU."""
    if isinstance(found, Tensor):
        return getattr(found, "held", found).double()
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    return found


@pytest.mark.parametrize("combine", ["gate", "content"])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_sees_the_same(name: str, combine: str) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 23, (ROWS, SEGMENT * SEGMENTS), generator=generator)
    found = []
    for away in (False, True):
        with ExitStack() as stack, torch.no_grad():
            module = make_module(combine)
            if away:
                stack.enter_context(two_devices())
                send_away(module)
                module._device, ids = AWAY, ids.to(AWAY)
            for number, part in enumerate(ids.split(SEGMENT, 1)):
                batch = batch_of(part, number)
                bank = module.prepare_bank("predict", batch)
                output, _ = module.read("predict", batch)
                if number < SEGMENTS - 1:
                    module.commit("predict", batch, output)
            assert bank.memories[LAYER].device == CPU
            assert bank.caches[LAYER].keys.device == (AWAY if away else CPU)
            found.append(plain(READERS[name](module, batch, bank, output)))
    if name == "samples":
        assert found[1] == found[0]
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
