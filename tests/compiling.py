"""A backend of torch.compile that notes what it is given and runs it as it is: no C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers.model import compiled

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def noted() -> Iterator[list[Shapes]]:
    """Within, every graph that is compiled, as the shapes of its inputs by name."""
    made: list[Shapes] = []
    real = torch.compile

    def backend(graph: Any, _: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given = {node.name: node.meta["example_value"] for node in inputs}
        made.append({k: tuple(x.shape) for k, x in given.items() if isinstance(x, Tensor)})
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(real, backend=backend))
        compiled._compiled.cache_clear()
        torch._dynamo.reset()
        yield made
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def differences(one: Shapes, other: Shapes) -> dict[str, Any]:
    """The inputs in which two graphs differ."""
    names = sorted({*one, *other})
    return {k: (one.get(k), other.get(k)) for k in names if one.get(k) != other.get(k)}
