"""Recall and time of a search; weights of one model loaded into another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_studies.ablation.evaluation import MeasuredSearch
from memorizing_studies.ablation.taken_weights import PART_OF_READER, load_weights
from memorizing_transformers.errors import UserError
from memorizing_transformers.memory import Memory, Neighbours
from memorizing_transformers.memory.search.exact import ExactSearch
from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.checkpoint import folder
from memorizing_transformers.training.checkpoint.resume import ARCHITECTURE_KEY
from memorizing_transformers.training.checkpoint.weights import OF_MEMORY


def half_search(queries: Tensor, memory: Memory, top_k: int) -> Neighbours:
    slots, valid = ExactSearch()(queries, memory, top_k)
    return Neighbours(slots, valid & (torch.arange(top_k) < top_k // 2))


@pytest.mark.parametrize(("search", "recall"), [(ExactSearch(), 1.0), (half_search, 0.5)])
def test_recall_is_the_share_of_true_neighbours(search: Any, recall: float) -> None:
    memory = Memory(2, 2, 64, 8)
    pairs = torch.randn(2, 2, 48, 8)
    memory.write(pairs, pairs)
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    measured = MeasuredSearch(search)
    queries = torch.randn(2, 2, 40, 8)
    found, plain = measured(queries, memory, 4), search(queries, memory, 4)
    assert torch.equal(found.slots, plain.slots)
    assert measured.recalls == [recall]
    assert measured.seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())


def net(seed: int, **memory: Any) -> Transformer:
    torch.manual_seed(seed)
    settings = MemoryConfig(**{"size": 16, "top_k": 2, "layers": [-1], **memory})
    config = ModelConfig(vocab_size=16, d_model=8, num_layers=2, num_heads=2, memory=settings)
    return Transformer(config)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stores a network's weights as a checkpoint's trainer part."""
    monkeypatch.setattr(folder, "verify", lambda path, names: {})

    def save(network: Transformer) -> Path:
        state = {f"net.{name}": tensor for name, tensor in network.state_dict().items()}
        checkpoint = {"state_dict": state, ARCHITECTURE_KEY: network.architecture()}
        torch.save(checkpoint, tmp_path / folder.TRAINER_FILE)
        return tmp_path

    return save


def test_a_model_without_memory_gives_its_weights_to_one_with(saved: Any) -> None:
    plain, target = net(1, layers=[]), net(2)
    with pytest.raises(UserError, match=r"lacks layers\.1\.attention\.reader\.gate"):
        load_weights(target, saved(plain), fresh_memory=False)
    gate = target.layers[1].attention.reader.gate.logit.detach().clone()
    load_weights(target, saved(plain), fresh_memory=True)
    state = target.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(state["layers.1.attention.reader.gate.logit"], gate)


def test_gates_are_left_out_where_there_is_no_memory(saved: Any) -> None:
    target, source = net(2, layers=[]), net(1)
    own, given = target.state_dict(), source.state_dict()
    assert not torch.equal(own["embedding.weight"], given["embedding.weight"])
    load_weights(target, saved(source), fresh_memory=False)
    assert all(torch.equal(tensor, given[name]) for name, tensor in target.state_dict().items())
    assert any("gate" in name for name in given.keys() - own.keys())


WITH_COPIES = {"copy": ["neighbours", "repeats"], "combine": "evidence", "match_length": 2}


@pytest.mark.parametrize("fresh_memory", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("change", [{"copy": []}, {"copy": ["repeats"]}, {"layers": []}], ids=str)
def test_a_copy_head_is_left_out_where_there_is_none(
    saved: Any, change: dict[str, Any], fresh_memory: bool
) -> None:
    target, source = net(2, **{**WITH_COPIES, **change}), net(1, **WITH_COPIES)
    given = source.state_dict()
    load_weights(target, saved(source), fresh_memory=fresh_memory)
    assert all(torch.equal(tensor, given[name]) for name, tensor in target.state_dict().items())
    assert any(name.startswith("copy_head.") for name in given.keys() - target.state_dict().keys())


def test_what_a_copy_head_lacks_is_named_or_keeps_its_start(saved: Any) -> None:
    target, source = net(2, **WITH_COPIES), net(1, **{**WITH_COPIES, "copy": ["repeats"]})
    with pytest.raises(UserError, match=r"lacks copy_head\.sources\.neighbours"):
        load_weights(target, saved(source), fresh_memory=False)
    load_weights(target, saved(source), fresh_memory=True)


OTHER_MEANING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"position_bias": "t5"}, {"position_bias": "learned-absolute"}, "position_bias"),
    (
        {"position_bias": "t5"},
        {"position_bias": "t5", "bias_max_distance": 99},
        "bias_max_distance",
    ),
    ({"position_bias": "t5"}, {"position_bias": "t5", "bias_buckets": 16}, "bias_buckets"),
    ({"match_length": 3}, {"match_length": 4}, "match_length"),
    ({"combine": "joint-bias"}, {"combine": "evidence"}, "combine"),
    ({"combine": "evidence"}, {"combine": "joint-bias"}, "combine"),
]


@pytest.mark.parametrize(("then", "now", "key"), OTHER_MEANING, ids=str)
def test_weights_of_another_meaning_start_anew_or_are_refused(
    saved: Any, then: dict[str, Any], now: dict[str, Any], key: str
) -> None:
    source, target = net(1, temperature=True, **then), net(2, temperature=True, **now)
    with torch.no_grad():
        for parameter in source.memory_parameters():
            parameter.fill_(3.0)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    line = rf"^from: model\.memory\.{key} = {now[key]!r} \(there: "
    with pytest.raises(UserError, match=line):
        load_weights(target, saved(source), fresh_memory=False)
    assert all(torch.equal(before[name], x) for name, x in target.state_dict().items())
    load_weights(target, saved(source), fresh_memory=True)
    part = PART_OF_READER[key]
    for name, tensor in target.state_dict().items():
        anew = f".reader.{part}." in name
        expected = (
            before[name] if anew or name not in source.state_dict() else source.state_dict()[name]
        )
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"position_bias": "log"}, {"position_bias": "log", "bias_max_distance": 99}),
        ({"position_bias": "log"}, {"position_bias": "log", "bias_buckets": 16}),
        ({"bias_max_distance": 99}, {}),
        ({"position_bias": "t5"}, {}),
        ({"combine": "gate"}, {"combine": "fixed"}),
        ({"match_length": 3}, {}),
        ({"temperature": True}, {}),
    ],
    ids=str,
)
def test_settings_that_change_no_meaning_are_evaluated(
    saved: Any, then: dict[str, Any], now: dict[str, Any]
) -> None:
    source, target = net(1, **then), net(2, **now)
    load_weights(target, saved(source), fresh_memory=False)
    given = source.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in target.state_dict().items())


def test_every_setting_of_the_memorys_weights_is_known() -> None:
    """temperature and copy say which weights there are, not what they mean."""
    known = {*PART_OF_READER, "temperature", "copy"}
    assert {f"memory.{name}" for name in known} == {*OF_MEMORY}


OTHER: dict[str, Any] = {
    "vocab_size": 17,
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 2,
    "d_ff": 8,
    "activation": "relu2",
    "value_residual": True,
    "embedding_shortcut": True,
    "qk_norm": False,
    "relative_buckets": 16,
    "relative_max_distance": 64,
}
"""By setting of the base model on which its weights depend, a value that ``net`` does not have."""


def test_every_setting_of_the_base_model_is_tried() -> None:
    assert {key for key in net(1).architecture() if not key.startswith("memory.")} == {*OTHER}


@pytest.mark.parametrize("fresh_memory", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("key", OTHER)
def test_weights_of_another_architecture_are_refused(
    saved: Any, key: str, fresh_memory: bool
) -> None:
    """Also where names and shapes are the same."""
    source = net(1)
    target = Transformer(replace(source.config, **{key: OTHER[key]}))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    line = rf"^from: .*model\.{key} = {OTHER[key]!r} \(there: "
    with pytest.raises(UserError, match=line):
        load_weights(target, saved(source), fresh_memory=fresh_memory)
    assert all(torch.equal(before[name], x) for name, x in target.state_dict().items())


def test_a_setting_that_came_after_the_checkpoint_had_its_default(saved: Any) -> None:
    source = net(1)
    old = {k: v for k, v in source.architecture().items() if k != "activation"}
    source.architecture = lambda: old  # type: ignore[method-assign]
    load_weights(net(2), saved(source), fresh_memory=False)
    squared = Transformer(replace(source.config, activation="relu2"))
    with pytest.raises(UserError, match=r"activation = 'relu2' \(there: 'relu'\)"):
        load_weights(squared, saved(source), fresh_memory=False)
