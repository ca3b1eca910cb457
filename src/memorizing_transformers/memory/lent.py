"""A memory inside a compiled graph: counts as tensors, and ops whose inside the compiler skips.

Of a memory the host knows numbers that change with every write, which a compiler would take for
constants. So a graph is lent copies of the counts, and a ticket: a tensor that holds a number. By
that number the ops below find the memory, its search and its snapshot. A loan ends with its ticket;
autograd keeps the ticket as long as a backward pass may come.

The ops may not be captured by a CUDA graph: they read what the host knows.

Shapes: B rows, G key/value heads, Q queries, K neighbours, M slots, D head width, N segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.library import custom_op

from .gathered import dots, keys_of, values_of, weighted_sum
from .ring import Memory
from .search.protocol import Neighbours, Search
from .slots import Slots
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .repeats import RepeatSearch

OUTSIDE = (torch.Tag.cudagraph_unsafe,)


class _Loan(NamedTuple):
    memory: Memory
    search: Search
    repeats: RepeatSearch | None
    reading: Snapshot | None


_loans: dict[int, _Loan] = {}
_numbers = count()


def can_lend(memory: Any) -> bool:
    """Whether a graph can read this memory; views, subclasses and libraries are read eagerly."""
    return type(memory) is Memory and memory.library is None


class LentMemory(Slots):
    """What a graph knows of a memory. Reads as the memory does; pairs come through ops alone.

    Args:
        memory: what is lent, as it is now.
        search: how it is searched.
        repeats: finds earlier occurrences of its text, where a copy head asks for them.
    """

    owners: None = None
    library: None = None

    def __init__(self, memory: Memory, search: Search, repeats: RepeatSearch | None = None) -> None:
        self.size = memory.size
        self.width = memory.keys.shape[-1]
        live = torch.is_grad_enabled()
        for name in ("written", "origin", "oldest", "token_ids"):
            # The backward pass may read these, after the memory was written.
            counts = getattr(memory, name)
            setattr(self, name, counts.clone() if live else counts)
        number = next(_numbers)
        reading = memory.snapshot() if live else None
        _loans[number] = _Loan(memory, search, repeats, reading)
        self.ticket = torch.tensor(number)
        """() int64 on the CPU."""
        finalize(self.ticket, _loans.pop, number, None).atexit = False

    @property
    def base(self) -> LentMemory:
        """What is read: this one."""
        return self

    @staticmethod
    def search(queries: Tensor, memory: Any, top_k: int) -> Neighbours:
        """Find ``top_k`` neighbours of queries (B, G, Q, D)."""
        return Neighbours(*_search(queries, memory.ticket, top_k))

    def find_repeats(self, input_ids: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
        """What ``RepeatSearch`` finds for a segment (B, N): three times (B, N, C) int64."""
        return _repeats(input_ids, self.ticket, candidates)

    def dots(self, slots: Tensor, valid: Tensor, x: Tensor) -> Tensor:
        """Inner products (B, G, Q, K) of x (B, G, Q, D) fp32 with the keys at ``slots``."""
        return _dots(x, slots, valid, self.ticket, False)

    def weighted_sum(self, slots: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        """Sums (B, G, Q, D) of the values at ``slots`` by weights (B, G, Q, K) fp32."""
        return _weighted_sum(weights, slots, valid, self.ticket, True, self.width)


def lend(
    memories: Mapping[int, Memory], searches: Mapping[int, Search], repeats: RepeatSearch | None
) -> dict[int, LentMemory]:
    """What a graph gets of memories, by layer.

    Args:
        memories: by layer.
        searches: by layer, how those are searched that have no search of their own.
        repeats: as ``LentMemory`` takes it.
    """
    return {
        layer: LentMemory(memory, memory.search or searches[layer], repeats)
        for layer, memory in memories.items()
    }


def _loan(ticket: Tensor) -> _Loan:
    return _loans[int(ticket)]


@custom_op(
    "memorizing_transformers::search",
    mutates_args=(),
    schema="(Tensor queries, Tensor ticket, SymInt top_k) -> (Tensor, Tensor)",
    tags=OUTSIDE,
)
def _search(queries: Tensor, ticket: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    loan = _loan(ticket)
    with torch.autocast(queries.device.type, enabled=False):
        slots, valid = loan.search(queries, loan.memory, top_k)
    return slots.contiguous(), valid.contiguous()


@_search.register_fake
def _(queries: Tensor, ticket: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], top_k)
    slots = queries.new_empty(shape, dtype=torch.int64)
    return slots, queries.new_empty(shape, dtype=torch.bool)


@custom_op(
    "memorizing_transformers::repeats",
    mutates_args=(),
    schema="(Tensor input_ids, Tensor ticket, SymInt candidates) -> (Tensor, Tensor, Tensor)",
    tags=OUTSIDE,
)
def _repeats(input_ids: Tensor, ticket: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    loan = _loan(ticket)
    assert loan.repeats is not None
    tokens, lengths, distances = loan.repeats(input_ids, loan.memory)
    return tokens.contiguous(), lengths.contiguous(), distances.contiguous()


@_repeats.register_fake
def _(input_ids: Tensor, ticket: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, lengths, distances = (
        input_ids.new_empty((*input_ids.shape, candidates)) for _ in range(3)
    )
    return tokens, lengths, distances


def _rows(slots: Tensor, valid: Tensor, ticket: Tensor, values: bool) -> Any:
    memory, _, _, reading = _loan(ticket)
    counted = None if slots.device.type == "cpu" and valid.all() else valid
    return (values_of if values else keys_of)(memory, slots, counted, reading)


@custom_op(
    "memorizing_transformers::dots",
    mutates_args=(),
    schema="(Tensor x, Tensor slots, Tensor valid, Tensor ticket, bool values) -> Tensor",
    tags=OUTSIDE,
)
def _dots(x: Tensor, slots: Tensor, valid: Tensor, ticket: Tensor, values: bool) -> Tensor:
    return dots(x, _rows(slots, valid, ticket, values))


@_dots.register_fake
def _(x: Tensor, slots: Tensor, valid: Tensor, ticket: Tensor, values: bool) -> Tensor:
    return x.new_empty(slots.shape, dtype=torch.float32)


@custom_op(
    "memorizing_transformers::weighted_sum",
    mutates_args=(),
    schema="(Tensor weights, Tensor slots, Tensor valid, Tensor ticket, bool values, SymInt width)"
    " -> Tensor",
    tags=OUTSIDE,
)
def _weighted_sum(
    weights: Tensor, slots: Tensor, valid: Tensor, ticket: Tensor, values: bool, width: int
) -> Tensor:
    return weighted_sum(weights, _rows(slots, valid, ticket, values))


@_weighted_sum.register_fake
def _(
    weights: Tensor, slots: Tensor, valid: Tensor, ticket: Tensor, values: bool, width: int
) -> Tensor:
    return weights.new_empty((*slots.shape[:-1], width), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, slots, valid, ticket, values, *_ = inputs
    ctx.save_for_backward(slots, valid, ticket)
    ctx.values, ctx.width = values, x.shape[-1]


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, valid, ticket = ctx.saved_tensors
    own = _weighted_sum(grad, slots, valid, ticket, ctx.values, ctx.width)
    return own, None, None, None, None


def _weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, valid, ticket = ctx.saved_tensors
    return _dots(grad, slots, valid, ticket, ctx.values), None, None, None, None, None


_dots.register_autograd(_dots_backward, setup_context=_keep)
_weighted_sum.register_autograd(_weighted_sum_backward, setup_context=_keep)
