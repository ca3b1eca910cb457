"""model.init_from: the weights of a finished model as the start of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from small import Losses, Run, assert_alike, command, make_data, make_module, make_trainer
from torch import Tensor

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.trainer import MemoryTrainer

BPE = {"tokenizer": "bpe", "bpe_vocab_size": 256 + 24}


def trained(texts: Path, folder: Path, data: dict[str, Any] | None = None, **settings: Any) -> Path:
    """The checkpoint of four steps."""
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=4)
    trainer = MemoryTrainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        logger=False,
        callbacks=[keep],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(make_module(**settings), datamodule=make_data(texts, **(data or {})))
    return folder / "step=4.ckpt"


def exported(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("exported")
    load_model(checkpoint).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    content = torch.load(folder / "trainer.ckpt", weights_only=True)
    return {name.removeprefix("net."): value for name, value in content["state_dict"].items()}


def started(
    texts: Path, source: Path | None, data: dict[str, Any] | None = None, **settings: Any
) -> tuple[MemorizingLM, dict[str, Tensor], list[float], Any]:
    """A run of two steps: module, its weights at the start, losses, trainer."""
    begun: dict[str, Tensor] = {}

    class Look(Losses):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index:
                return
            begun.update({k: v.detach().clone() for k, v in module.net.state_dict().items()})
            assert trainer.global_step == 0
            assert not trainer.optimizers[0].state

    losses = Look()
    module = make_module(init_from=None if source is None else str(source), **settings)
    trainer = make_trainer(max_steps=2, callbacks=[losses])
    trainer.fit(module, datamodule=make_data(texts, **(data or {})))
    return module, begun, losses.values, trainer


@pytest.mark.parametrize("export", [False, True], ids=["checkpoint", "export"])
def test_a_run_starts_with_the_weights_and_nothing_else(
    export: bool, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = trained(texts, tmp_path)
    source = exported(source) if export else source
    _, begun, losses, trainer = started(texts, source)
    assert_alike(begun, weights_of(source))
    _, _, other, _ = started(texts, None)
    assert losses[0] < other[0]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2
    count = len(begun)
    assert f"model.init_from: {count} of {count} weights are those of {source}" in caplog.text
    assert "start as in" not in caplog.text
    assert "not used" not in caplog.text


def new_and_left(text: str) -> dict[str, str]:
    """What was said, by what it is about."""
    lines = [line.partition("model.init_from: ")[2] for line in text.splitlines()]
    kinds = {"start as in a new model: ": "new", "of that model are not used: ": "left"}
    return {
        kind: line.partition(what)[2]
        for line in lines
        for what, kind in kinds.items()
        if what in line
    }


CONTENT = "layers.1.attention.reader.gate.linear"
GATE = "layers.1.attention.reader.gate.logit"
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "a memory added": ({"size": 0}, {"gate_init": 0.2}, {"new": GATE}),
    "no layer had one": ({"layers": []}, {}, {"new": GATE}),
    "a memory taken away": ({}, {"layers": []}, {"left": GATE}),
    "a memory switched off": ({}, {"size": 0}, {}),
    "another size": ({}, {"size": 64, "top_k": 8}, {}),
    "more layers": ({}, {"layers": [0, 1]}, {"new": "layers.0.attention.reader.gate.logit"}),
    "fewer layers": ({"layers": [0, 1]}, {}, {"left": "layers.0.attention.reader.gate.logit"}),
    "another gate": (
        {},
        {"combine": "content"},
        {
            "new": f"{CONTENT}.weight, {CONTENT}.bias",
            "left": GATE,
        },
    ),
    "another meaning": (
        {"position_bias": "t5"},
        {"position_bias": "learned-absolute"},
        {name: f"{GATE}, layers.1.attention.reader.bias.table.weight" for name in ("new", "left")},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_memory_may_differ_in_every_setting(
    name: str, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after, said = OTHERS[name]
    source = trained(texts, tmp_path, **before)
    caplog.set_level("INFO")
    caplog.clear()
    _, begun, losses, _ = started(texts, source, **after)
    assert new_and_left(caplog.text) == said
    _, fresh, _, _ = started(texts, None, **after)
    given = weights_of(source)
    for key, value in begun.items():
        new = key in said.get("new", "").split(", ")
        assert torch.equal(value, fresh[key] if new else given[key]), key
    assert all(loss < 6 for loss in losses)


def test_many_names_make_one_line(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {"num_layers": 6, "d_model": 8}
    source = trained(texts, tmp_path, layers=[], **layers)
    caplog.set_level("INFO")
    started(texts, source, layers=[*range(6)], **layers)
    assert "6 weights start as in a new model" in caplog.text
    assert new_and_left(caplog.text)["new"].endswith(
        "layers.2.attention.reader.gate.logit and 3 more"
    )


@pytest.mark.parametrize("export", [False, True], ids=["checkpoint", "export"])
@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"d_model": 32}, ["model.d_model = 32 (there: 16)", "model.head_dim = 16 (there: 8)"]),
        ({"num_heads": 4}, ["model.num_heads = 4 (there: 2)"]),
        ({"num_layers": 3}, ["model.num_layers = 3 (there: 2)"]),
        ({"qk_norm": False}, ["model.qk_norm = False (there: True)"]),
        # Of the same shapes, but their numbers mean something else.
        ({"relative_max_distance": 64}, ["model.relative_max_distance = 64 (there: 128)"]),
        ({"vocab_size": 300}, ["model.vocab_size = 300 (there: 256)"]),
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_its_keys(
    settings: dict[str, Any], keys: list[str], export: bool, texts: Path, tmp_path: Path
) -> None:
    source = trained(texts, tmp_path)
    source = exported(source) if export else source
    with pytest.raises(ConfigError) as caught:
        started(texts, source, **settings)
    message = str(caught.value)
    assert message.startswith(f"model.init_from = '{source}': ")
    assert all(key in message for key in keys)
    assert "\n" not in message


@pytest.mark.parametrize("export", [False, True], ids=["checkpoint", "export"])
def test_another_tokenizer_is_refused(export: bool, texts: Path, tmp_path: Path) -> None:
    source = trained(texts, tmp_path, BPE)
    source = exported(source) if export else source
    other = {**BPE, "bpe_train_bytes": 300}
    assert make_data(texts, **other).vocab_size == make_data(texts, **BPE).vocab_size
    started(texts, source, BPE)
    with pytest.raises(ConfigError, match=r"another tokenizer than data\.tokenizer"):
        started(texts, source, other)


def test_what_is_no_model_is_refused(texts: Path, tmp_path: Path) -> None:
    source = trained(texts, tmp_path / "run")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name in ("nowhere", "file", "run", "other", "broken"):
        with pytest.raises(ConfigError, match=f"model.init_from = '{tmp_path / name}': "):
            started(texts, tmp_path / name)
    folder = exported(source)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        started(texts, folder)
    content = bytearray((source / "trainer.ckpt").read_bytes())
    content[-100] ^= 1
    (source / "trainer.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match="was changed after it was written"):
        started(texts, source)


def test_a_lack_of_weights_is_told(texts: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = exported(trained(texts, tmp_path))
    weights = load_file(folder / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks weights of this model: norm\.weight"):
        started(texts, folder)


def test_the_command_line_retrofits_a_memory_and_resumes_without_the_source(
    run: Run, config: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning")
    caplog.set_level("INFO", "lightning.pytorch")
    quick = ("--final_report", "false", "--trainer.max_steps", "8")
    code, _, err = command("fit", "--config", config, *quick, "--model.memory.size", "0")
    assert code == 0, err
    source = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    given = ("fit", "--config", config, *quick, "--model.init_from", source)
    code, _, err = command(*given)
    assert code == 0, err
    assert (
        "model.init_from: 1 weights start as in a new model: layers.1.attention.reader.gate.logit"
        in caplog.text
    )
    retrofitted = tmp_path / "runs" / "version_1"
    saved = yaml.safe_load((retrofitted / "config.yaml").read_text())
    assert saved["model"]["init_from"] == str(source)
    last = torch.load(retrofitted / "checkpoints" / "last.ckpt" / "trainer.ckpt", weights_only=True)
    assert last["global_step"] == 8
    # The checkpoint wins: where the weights once came from does not matter any more.
    source.rename(tmp_path / "gone.ckpt")
    code, _, err = command(*given, "--trainer.max_steps", "10", "--ckpt_path", "last")
    assert code == 0, err
    code, _, err = command(*given)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: model.init_from = '{source}': ")


def test_the_command_line_tests_given_weights(run: Run, tmp_path: Path) -> None:
    code, out, err = command(
        "test", "--config", run.config, "--model.init_from", run.checkpoint,
        "--trainer.default_root_dir", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "untrained" not in err
    code, other, _ = command(
        "test", "--config", run.config, "--ckpt_path", run.checkpoint,
        "--trainer.default_root_dir", tmp_path,
    )  # fmt: skip
    figures = [line for line in out.splitlines() if "test/loss" in line]
    assert figures
    assert figures == [line for line in other.splitlines() if "test/loss" in line]
