"""A pretrained model is trained, saved and resumed as our own models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from base_runs import KINDS, data_of, fit, module_of, trainer_of
from lightning.pytorch.callbacks import LambdaCallback

from memorizing_transformers.errors import ConfigError, UserError
from memorizing_transformers.pretrained.adapt import AdaptedModel, load_base
from memorizing_transformers.training.checkpoint.folder import open_checkpoint


@pytest.mark.parametrize("train", KINDS)
def test_what_is_trained_changes_and_is_saved_and_nothing_else(
    home: Path, tmp_path: Path, train: str
) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    module, _ = fit(home, tmp_path, train=train)
    before = module_of(home, train=train)
    before.trainer = trainer_of()  # type: ignore[assignment]
    before.configure_model()
    now, then = dict(module.net.named_parameters()), dict(before.net.named_parameters())
    changed = {name for name in now if not torch.equal(now[name], then[name])}
    net = module.net
    assert isinstance(net, AdaptedModel)
    # LoRA's first matrix gets a gradient only once the second is not 0; all are trained.
    assert changed <= net.trained
    assert {n for n in net.trained if "memory_reader" in n} <= changed
    saved = open_checkpoint(tmp_path / "step=6.ckpt")["state_dict"]
    assert {name.removeprefix("net.") for name in saved} == net.trained
    kinds = {"gates": "memory_reader", "projections": "self_attn", "lora": "lora_", "all": "mlp"}
    assert any(kinds[train] in name for name in changed)
    if train == "projections":
        assert all("layers.1.self_attn" in name for name in net.trained)


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_resumes_bit_for_bit(
    home: Path, tmp_path: Path, train: str, checkpointing: bool
) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    options = {"train": train, "activation_checkpointing": checkpointing}
    unbroken, expected = fit(home, tmp_path / "a", **options)
    resumed, losses = fit(home, tmp_path / "b", resume=tmp_path / "a" / "step=3.ckpt", **options)
    assert losses == expected[3:]
    for name, parameter in unbroken.net.named_parameters():
        assert torch.equal(parameter, resumed.net.get_parameter(name)), name
    for name, tensor in unbroken.banks["train"].tensors().items():
        assert torch.equal(tensor, resumed.banks["train"].tensors()[name]), name


def test_activations_that_are_computed_again_give_the_same_losses(
    home: Path, tmp_path: Path
) -> None:
    _, expected = fit(home, tmp_path / "a", train="all")
    _, losses = fit(home, tmp_path / "b", train="all", activation_checkpointing=True)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    fit(home, tmp_path, steps=3)
    module = module_of(home, base="other")
    with pytest.raises(UserError, match=r"model\.base = "):
        trainer_of().test(module, data_of(home), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)


def test_a_test_without_training_and_predictions_work(home: Path, tmp_path: Path) -> None:
    module = module_of(home)
    trainer = trainer_of()
    found = trainer.test(module, data_of(home), verbose=False)[0]
    module.memory_size = 0
    without = trainer.test(module, data_of(home), verbose=False)[0]
    assert found["test/loss"] != without["test/loss"]
    module.memory_size = None
    (batch, *_) = trainer.predict(module, data_of(home))  # type: ignore[misc]
    assert batch["loss"].shape == (2, 16)  # type: ignore[index,call-overload]
    assert 1 in batch["best"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d_model": 64}, "model.d_model = 64"),
        ({"dropout": 0.1}, "model.dropout = 0.1"),
        ({"compile": True}, "model.compile"),
        ({"memory": {"refresh_every_n_steps": 2}}, "refresh_every_n_steps"),
        ({"memory": {"copy": ["repeats"]}}, "model.memory.copy"),
        ({"base": "nothing"}, "model.base"),
        ({"init_from": "somewhere"}, "model.init_from"),
    ],
)
def test_settings_that_a_base_does_not_take_are_named(
    home: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        trainer_of().test(module_of(home, **options), data_of(home), verbose=False)


def test_data_with_another_tokenizer_are_refused(home: Path) -> None:
    data = data_of(home, tokenizer="bytes")
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*model\.base"):
        trainer_of().test(module_of(home), data, verbose=False)


def test_segments_beyond_the_window_are_refused_before_any_is_read(home: Path) -> None:
    started: list[bool] = []
    seen = LambdaCallback(on_fit_start=lambda *_: started.append(True))
    window = load_base(str(home / "base")).config.max_position_embeddings
    data = data_of(home, segment_length=window + 1)
    with pytest.raises(ConfigError, match=rf"data\.segment_length = {window + 1}: .*\({window}\)"):
        trainer_of(seen).fit(module_of(home), data)
    assert not started


def test_a_base_is_made_on_the_cpu_wherever_lightning_builds(home: Path) -> None:
    """Lightning builds under the device of the run, where generators of the CPU are refused."""
    module = module_of(home)
    module.trainer = trainer_of()
    with torch.device("meta"):
        net = module.build_net()
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
