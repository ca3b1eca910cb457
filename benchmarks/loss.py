"""Peak memory and time of the loss, forward and backward, with all logits and in chunks.

    python benchmarks/loss.py --tokens 1024 --vocab 131072 --width 256
    python benchmarks/loss.py --tokens 16384 --vocab 131072 --width 256 --ways chunks

Each way runs in a process of its own. Its peak is the largest resident memory (on a GPU: the
largest that torch allocated) less what hidden states and weights need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers.model.forecast import forecast

Inputs = tuple[Tensor, Tensor, Tensor]


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As it was: (T, V) logits, then cross entropy in fp32."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As training does it."""
    return forecast(hidden, weight, targets).nll


def torch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Torch's own, which knows neither hits nor candidates."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


WAYS = {"all": all_logits, "chunks": chunks, "torch": torch_chunks}


def measure(way: str, given: argparse.Namespace, results: SimpleQueue[Any]) -> None:
    """Put peak bytes and seconds of one way into the queue."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"

    def peak() -> int:
        if on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=given.bf16):
            nll = WAYS[way](hidden, weight, targets)
        (nll.float().sum() / len(targets)).backward()

    def inputs(tokens: int, vocab: int) -> Inputs:
        hidden = torch.randn(tokens, given.width, device=device, requires_grad=True)
        weight = torch.randn(vocab, given.width, device=device) / given.width**0.5
        return hidden, weight.requires_grad_(), torch.randint(vocab, (tokens,), device=device)

    step(*inputs(8, 64))  # libraries need memory of their own at first
    made = inputs(given.tokens, given.vocab)
    before = peak()
    start = time.perf_counter()
    step(*made)
    bytes_used = peak() - before
    results.put((bytes_used, time.perf_counter() - start))


def main() -> None:
    """Measure, and print one line of JSON for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 1024), ("vocab", 131072), ("width", 256), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bf16")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for way in given.ways:
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(way, given, results))
        process.start()
        process.join()
        if process.exitcode:
            # It left no result, and to wait for one would never end.
            raise SystemExit(f"loss.py: the process of {way} ended with code {process.exitcode}")
        used, seconds = results.get()
        line = {"way": way, "peak_MiB": round(used / 2**20), "seconds": round(seconds, 2)}
        print(json.dumps({**line, "tokens": given.tokens, "vocab": given.vocab}))


if __name__ == "__main__":
    main()
