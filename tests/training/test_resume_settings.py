"""Resuming under other settings: each one takes effect or is refused in one line."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import COSINE, QUIET, Fit
from lightning.pytorch.callbacks import ModelCheckpoint
from small import assert_alike, make_data, make_module
from torch import Tensor, nn

from memorizing_transformers.errors import UserError
from memorizing_transformers.training import optimizers
from memorizing_transformers.training.checkpoint import folder as checkpoints
from memorizing_transformers.training.checkpoint.optimizer_state import SETTINGS_KEY
from memorizing_transformers.training.checkpoint.resume import ARCHITECTURE_KEY
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.optimizers import OptimizerConfig, make_optimizer
from memorizing_transformers.training.sharded import _by_name
from memorizing_transformers.training.trainer import MemoryTrainer


def rewrite(folder: Path, change: Any) -> Path:
    """Change the trainer's part of a checkpoint as if it had been written so."""
    file, manifest = folder / checkpoints.TRAINER_FILE, checkpoints.read_manifest(folder)
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    written = file.read_bytes()
    entry = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    manifest["files"][checkpoints.TRAINER_FILE] = entry
    plain = {key: value for key, value in manifest.items() if key != "seal"}
    seal = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    (folder / checkpoints.MANIFEST).write_text(json.dumps({**plain, "seal": seal}))
    return folder


def forget_settings(folder: Path) -> Path:
    """As checkpoints were before they noted the optimiser's settings."""
    return rewrite(folder, lambda content: content.pop(SETTINGS_KEY))


def without_dimension(content: dict[str, Any]) -> None:
    """Weights and moments of a checkpoint as they were before all had a dimension."""
    names = [n for n in content["state_dict"] if n.endswith((".slope", ".toward_likely"))]
    assert len(names) == 2
    for name in names:
        content["state_dict"][name] = content["state_dict"][name].squeeze()
    for state in content["optimizer_states"][0]["state"].values():
        for key, value in state.items():
            if value.shape == (1,):
                state[key] = value.squeeze()


OTHER: dict[str, Any] = {
    "name": "adafactor",
    "lr": 3e-3,
    "options": {"eps": 0.1},
    "betas": (0.5, 0.98),
    "weight_decay": 0.7,
    "memory_lr_factor": 20.0,
    "schedule": "constant",
    "warmup_steps": 9,
    "total_steps": 8,
    "final_lr_share": 0.9,
}


@pytest.mark.parametrize("old", [False, True], ids=["noted", "not noted"])
@pytest.mark.parametrize("field", [field.name for field in fields(OptimizerConfig)])
def test_another_value_changes_the_rest_of_the_run_or_is_refused(
    field: str, old: bool, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = Fit(texts, tmp_path / "whole", 6, optimizer=COSINE)
    checkpoint = whole.checkpoint(4)
    if old:
        forget_settings(checkpoint)
    caplog.clear()
    again = Fit(texts, tmp_path / "again", 6, checkpoint, optimizer=COSINE)
    assert again.losses.values == whole.losses.values[4:]
    assert_alike(dict(again.module.state_dict()), dict(whole.module.state_dict()))
    assert "model.optimizer." not in caplog.text
    changed = {**COSINE, field: OTHER[field]}
    if field == "name":
        with pytest.raises(UserError) as caught:
            Fit(texts, tmp_path / "other", 6, checkpoint, optimizer=changed)
        message = str(caught.value)
        assert message.startswith("model.optimizer.name = 'adafactor': ")
        assert "adamw" in message
        assert "model.init_from" in message
        return
    other = Fit(texts, tmp_path / "other", 6, checkpoint, optimizer=changed)
    # The first loss is of the weights that were saved, the next one of the first step since.
    assert other.losses.values[0] == whole.losses.values[4]
    assert other.losses.values[1] != whole.losses.values[5]
    if not old or field in ("lr", "betas", "weight_decay"):
        assert f"model.optimizer.{field} = {OTHER[field]} (checkpoint: " in caplog.text


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_rates_after_a_resume_are_those_of_the_new_schedule_from_its_first_step(
    name: Any, texts: Path, tmp_path: Path
) -> None:
    first = Fit(texts, tmp_path / "first", 3, optimizer={"name": name, **COSINE})
    new = {"name": name, **COSINE, "lr": 0.4, "warmup_steps": 7, "weight_decay": 0.3}
    rest = Fit(texts, tmp_path / "rest", 8, first.checkpoint(3), optimizer=new)
    unbroken = Fit(texts, tmp_path / "unbroken", 8, optimizer=new)
    assert rest.start.rates == unbroken.start.rates[3:]
    assert [group["weight_decay"] for group in rest.optimizer.param_groups] == [0.3, 0.0]
    assert {group["initial_lr"] for group in rest.optimizer.param_groups} == {0.4}
    # And so they stay: a third run with the same settings goes on with them.
    third = Fit(texts, tmp_path / "third", 8, rest.checkpoint(6), optimizer=new)
    assert third.losses.values == rest.losses.values[3:]


@pytest.mark.parametrize(("before", "now"), [(1.0, 10.0), (10.0, 1.0)])
def test_muon_goes_on_where_the_memory_gets_a_rate_of_its_own_or_loses_it(
    before: float, now: float, texts: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"name": "muon", **COSINE}
    first = Fit(texts, tmp_path / "a", 3, optimizer={**settings, "memory_lr_factor": before})
    saved = {p: first.optimizer.state[q] for p, q in first.module.net.named_parameters()}
    checkpoint, changed = first.checkpoint(3), {**settings, "memory_lr_factor": now}
    rest = Fit(texts, tmp_path / "b", 4, checkpoint, optimizer=changed)
    for name, parameter in rest.module.net.named_parameters():
        state = rest.optimizer.state[parameter]
        assert state.keys() == saved[name].keys(), name
        assert float(state.get("step", 4)) == 4
    assert ("momentum_buffer" in saved["layers.0.attention.query.weight"]) is True
    assert "exp_avg" in saved["embedding.weight"]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("now", [1.0, 10.0])
def test_a_run_goes_on_whose_memory_numbers_decayed_by_their_shape(
    now: float, name: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in versions before: the groups had other members."""
    settings: dict[str, Any] = {"copy": ["neighbours", "repeats"], "combine": "evidence"}
    optimizer = {"name": name, **COSINE}
    with monkeypatch.context() as patch:
        older = functools.partial(optimizers.parameter_groups, by_shape=True)
        patch.setattr(optimizers, "parameter_groups", older)
        first = Fit(texts, tmp_path / "a", 3, optimizer=optimizer, **settings)
    decaying = {id(p) for group in first.optimizer.param_groups[:1] for p in group["params"]}
    head = first.module.net.copy_head
    assert head is not None
    assert id(head.sources["neighbours"].log_odds) in decaying
    saved = {n: first.optimizer.state[p] for n, p in first.module.net.named_parameters()}
    changed = {**optimizer, "memory_lr_factor": now}
    rest = Fit(texts, tmp_path / "b", 4, first.checkpoint(3), optimizer=changed, **settings)
    assert rest.start.state.keys() == saved.keys()
    for parameter, state in rest.start.state.items():
        assert alike(state, {k: torch.as_tensor(v) for k, v in saved[parameter].items()}), parameter


JOINED: list[dict[str, Any]] = [
    {},
    {"combine": "content", "position_bias": "t5"},
    {"combine": "fixed"},
    {"optimizer": {"name": "adafactor"}},
    {"layers": [0, 1], "combine": "joint", "position_bias": "learned-absolute"},
]


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("old", [False, True], ids=["noted", "not noted"])
@pytest.mark.parametrize("settings", JOINED, ids=str)
@pytest.mark.parametrize("sizes", [(0, 32), (32, 0)], ids=["on", "off"])
def test_a_memory_may_be_switched_on_and_off(
    sizes: tuple[int, int], settings: dict[str, Any], old: bool, texts: Path, tmp_path: Path
) -> None:
    first = Fit(texts, tmp_path / "first", 3, size=sizes[0], **settings)
    named = dict(first.module.net.named_parameters())
    state = first.optimizer.state
    checkpoint = first.checkpoint(3)
    if old:
        forget_settings(checkpoint)
    rest = Fit(texts, tmp_path / "rest", 8, checkpoint, size=sizes[1], **settings)
    assert_alike(rest.start.weights, {name: w.detach() for name, w in named.items()})
    of_memory = {
        name
        for name, weight in rest.module.net.named_parameters()
        if any(weight is other for other in rest.module.net.memory_parameters())
    }
    assert bool(of_memory) == (settings.get("combine") != "fixed")
    # Every weight that both train goes on with its own state, and no other has one.
    assert rest.start.state.keys() == named.keys() - of_memory
    for name, values in rest.start.state.items():
        saved = {key: torch.as_tensor(value) for key, value in state[named[name]].items()}
        assert alike(values, saved), name
    assert len(rest.losses.values) == 5
    now = dict(rest.module.net.named_parameters())
    moved = {name for name in of_memory if not torch.equal(now[name], named[name])}
    assert moved == (of_memory if sizes[1] else set())
    memories = rest.module.banks["train"].memories
    assert bool(memories) == bool(sizes[1])
    assert all(memory.written.any() for memory in memories.values())
    # What a switched run saved can be resumed bit for bit, too.
    third = Fit(texts, tmp_path / "third", 8, rest.checkpoint(6), size=sizes[1], **settings)
    assert third.losses.values == rest.losses.values[3:]
    assert_alike(dict(third.module.state_dict()), dict(rest.module.state_dict()))


def test_a_state_of_other_parameters_is_refused_in_one_line(texts: Path, tmp_path: Path) -> None:
    class Frozen(MemorizingLM):
        def configure_model(self) -> None:
            super().configure_model()
            self.net.embedding.weight.requires_grad_(False)

    first = Fit(texts, tmp_path / "first", 2)
    with pytest.raises(UserError, match="its optimiser trained other parameters") as caught:
        Fit(texts, tmp_path / "rest", 4, first.checkpoint(2), kind=Frozen)
    assert "model.init_from" in str(caught.value)
    # Frozen throughout, it resumes, with a memory switched on in between.
    frozen = Fit(texts, tmp_path / "frozen", 2, kind=Frozen, size=0)
    rest = Fit(texts, tmp_path / "more", 4, frozen.checkpoint(2), kind=Frozen)
    assert "embedding.weight" not in rest.start.state


def test_weights_alone_cannot_be_resumed_from(texts: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_weights_only=True)
    trainer = MemoryTrainer(max_steps=2, callbacks=[keep], limit_val_batches=0, **QUIET)
    trainer.fit(make_module(), datamodule=make_data(texts))
    folder = tmp_path / "step=2.ckpt"
    with pytest.raises(UserError, match="holds weights only") as caught:
        Fit(texts, tmp_path / "rest", 4, folder)
    assert str(folder) in str(caught.value)
    assert "model.init_from" in str(caught.value)
    evaluating = MemoryTrainer(limit_val_batches=1, **QUIET)
    assert evaluating.validate(make_module(), make_data(texts), ckpt_path=folder, verbose=False)


class Net(nn.Module):
    """Matrices and vectors in turn, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for index, shape in enumerate([(2, 3), (4,), (5, 2), (3,), (2, 2)]):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape)))
        self.p2.requires_grad_(False)


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))][::5])
def test_states_get_their_parameters_names_in_whatever_order_they_are_numbered(
    order: tuple[int, ...],
) -> None:
    net = Net()
    optimizer = make_optimizer(net, OptimizerConfig())
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }
    state = optimizer.state_dict()
    # Any numbers will do: the groups tell whose they are.
    state["state"] = {order[number]: value for number, value in reversed(state["state"].items())}
    for group in state["param_groups"]:
        group["params"] = [order[number] for number in group["params"]]
    named = _by_name(state, optimizer, net)
    assert_alike({name: value["exp_avg"] for name, value in named["state"].items()}, expected)
    live = [group["params"] for group in optimizer.param_groups]
    names = {parameter: name for name, parameter in net.named_parameters()}
    assert [group["params"] for group in named["param_groups"]] == [
        [names[parameter] for parameter in group] for group in live
    ]


def test_a_parameter_without_a_state_gets_the_one_that_adamw_begins_with() -> None:
    net = Net()
    optimizer = make_optimizer(net, OptimizerConfig())
    named = _by_name(optimizer.state_dict(), optimizer, net)
    assert named["state"].keys() == {"p0", "p1", "p3", "p4"}
    for name, value in named["state"].items():
        assert not any(tensor.any() for tensor in value.values())
        assert value["exp_avg"].shape == dict(net.named_parameters())[name].shape


LATER = ("temperature", "match_length", "copy")
"""Settings of the memory that checkpoints of earlier versions do not know."""


def test_a_checkpoint_that_lacks_later_settings_resumes(texts: Path, tmp_path: Path) -> None:
    unbroken = Fit(texts, tmp_path / "unbroken", 6, optimizer=COSINE)

    def forget(content: dict[str, Any]) -> None:
        for key in LATER:
            del content[ARCHITECTURE_KEY][f"memory.{key}"]

    old = rewrite(unbroken.checkpoint(4), forget)
    again = Fit(texts, tmp_path / "again", 6, old, optimizer=COSINE)
    assert again.losses.values == unbroken.losses.values[4:]
    with pytest.raises(UserError, match=r"memory\.copy"):
        Fit(texts, tmp_path / "other", 6, old, optimizer=COSINE, copy=["repeats"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_run_goes_on_whose_copy_head_had_numbers_of_no_dimension(
    name: Any, texts: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"copy": ["repeats"], "optimizer": {"name": name, **COSINE}}
    unbroken = Fit(texts, tmp_path / "unbroken", 6, **settings)
    old = rewrite(unbroken.checkpoint(4), without_dimension)
    again = Fit(texts, tmp_path / "again", 6, old, **settings)
    assert again.losses.values == unbroken.losses.values[4:]
    assert_alike(dict(again.module.state_dict()), dict(unbroken.module.state_dict()))


@pytest.mark.parametrize(("before", "now"), [([], [-1]), ([-1], [])])
def test_other_layers_of_memory_are_refused_with_the_key_that_switches_it(
    before: list[int], now: list[int], texts: Path, tmp_path: Path
) -> None:
    first = Fit(texts, tmp_path / "first", 3, layers=before)
    with pytest.raises(UserError) as caught:
        Fit(texts, tmp_path / "other", 6, first.checkpoint(3), layers=now)
    message = str(caught.value)
    assert "model.memory.layers = " in message
    assert "model.memory.size 0" in message
    assert "model.init_from" in message
