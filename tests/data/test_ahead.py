"""Batches made one ahead: the same ones, and a position that counts those handed out."""

from __future__ import annotations

import threading
from itertools import islice
from typing import Any

import pytest
import torch

from memorizing_transformers.data import ahead
from memorizing_transformers.data.batch import Batch
from memorizing_transformers.data.loader import SegmentLoader
from memorizing_transformers.data.row_plan import RowPlan

GPU = torch.device("cuda", 3)
LENGTHS = [40, 2, 17, 90, 33, 9, 64, 16, 65, 5]


class Pinning:
    """Stands for CUDA: notes what was pinned, and for which device, in which thread."""

    def __init__(self) -> None:
        self.devices: dict[int, Any] = {}
        self.pinned: list[tuple[int, Batch]] = []

    def set_device(self, device: torch.device) -> None:
        self.devices[threading.get_ident()] = device

    def __call__(self, batch: Batch) -> Batch:
        thread = threading.get_ident()
        assert self.devices[thread] == GPU
        self.pinned.append((thread, batch))
        return batch


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> Pinning:
    pinning = Pinning()
    monkeypatch.setattr(torch.cuda, "set_device", pinning.set_device)
    monkeypatch.setattr(ahead, "pinned", pinning)
    return pinning


@pytest.fixture
def store(make_store: Any) -> Any:
    return make_store(LENGTHS)


def loader(store: Any, gpu: torch.device | None = GPU, **options: Any) -> SegmentLoader:
    train = options.pop("train", True)
    return SegmentLoader(store, RowPlan(store.lengths, 4, 16, 1, train), gpu=gpu, **options)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 3, "repeat": True}], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_batches_and_positions_are_those_of_a_loader_that_makes_none_ahead(
    options: dict[str, Any], train: bool, store: Any, pinning: Pinning
) -> None:
    plain, other = (
        loader(store, None, train=train, **options),
        loader(store, train=train, **options),
    )
    for left_early in (False, True, False, False):
        count = 2 if left_early else 99
        for one, two in zip(islice(plain, count), islice(other, count), strict=True):
            assert same(one, two)
            assert plain.state_dict() == other.state_dict()
    assert pinning.pinned


@pytest.mark.parametrize("delivered", [0, 1, 5, 6, 17])
def test_it_resumes_with_the_batch_after_the_last_one_handed_out(
    delivered: int, store: Any, pinning: Pinning
) -> None:
    """Though the batch after that one is made already."""
    whole = loader(store, None)
    stream = [batch for _ in range(6) for batch in whole]
    stopped = loader(store)
    for _ in islice((batch for _ in range(4) for batch in stopped), delivered):
        pass
    resumed = loader(store)
    resumed.load_state_dict(stopped.state_dict())
    rest = [*resumed, *resumed]
    assert len(rest) == 12 - delivered % 6
    assert all(same(*pair) for pair in zip(rest, stream[delivered:], strict=False))


def test_the_next_one_is_made_while_one_is_in_use(store: Any, pinning: Pinning) -> None:
    """And no more than one; none after the last."""
    made = loader(store)
    batches = iter(made)
    for number in range(1, len(made) + 1):
        next(batches)
        for _ in range(500):
            if len(pinning.pinned) >= min(number + 1, len(made)):
                break
            threading.Event().wait(0.01)
        assert len(pinning.pinned) == min(number + 1, len(made))
    assert {thread for thread, _ in pinning.pinned}.isdisjoint({threading.get_ident()})


def test_no_thread_is_left_behind(store: Any, pinning: Pinning) -> None:
    batches = iter(loader(store))
    next(batches)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_comes_with_its_batch(
    store: Any, pinning: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = type(store).read, []

    def fails(self: Any, *where: Any) -> Any:
        calls.append(where)
        if len(calls) > 8:
            raise OSError("the disk is gone")
        return read(self, *where)

    monkeypatch.setattr(type(store), "read", fails)
    batches = iter(loader(store))
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_all_of_a_batch_is_pinned(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append(x) or x + 0)
    batch = loader(store, None).batch(0, 0)
    pinned = ahead.pinned(batch)
    assert all(a is b for a, b in zip(seen, batch, strict=True))
    assert same(pinned, batch)
