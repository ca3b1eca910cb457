"""A memorized model is saved without its base, and read back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from base_runs import KINDS, fit
from families import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from memorizing_transformers import MemorizedModel, MemorizingTransformer, memorize
from memorizing_transformers.__main__ import main
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.pretrained.saved import SETTINGS, WEIGHTS
from memorizing_transformers.training.checkpoint.export import load_model

SIZES = {"size": 32, "top_k": 4}


def read(model: MemorizedModel) -> Tensor:
    """Logits of three segments."""
    vocabulary = model.config.vocab_size or 0
    ids = torch.randint(vocabulary, (1, 24), generator=torch.Generator().manual_seed(1))
    bank, logits = model.new_memory(1), []
    with torch.no_grad():
        for segment in ids.split(8, dim=1):
            output = model(segment, bank)
            bank.commit(output.pairs, token_ids=segment)
            logits.append(output.logits)
    return torch.cat(logits, 1)


def memorized(folder: Path, **options: Any) -> MemorizedModel:
    """A model whose memory has weights that no start gives."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = memorize(base, SIZES, layers=[1], **options).eval()
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter.add_(0.3)
    return model


def run_command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", *map(str, args)])
    main()


@pytest.mark.parametrize("options", [{}, {"xl_cache": 8, "position": "start", "skip_first": 2}])
def test_what_memorize_made_comes_back(home: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = memorized(home / "base", **options)
    model.save_pretrained(tmp_path / "saved")
    found = MemorizedModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(read(found), read(model))
    assert (tmp_path / "saved" / WEIGHTS).stat().st_size < 2000
    # The base may lie elsewhere, or be in memory.
    again = MemorizedModel.from_pretrained(tmp_path / "saved", home / "base")
    assert torch.equal(read(again), read(model))
    loaded = AutoModelForCausalLM.from_pretrained(home / "base")
    again = MemorizedModel.from_pretrained(tmp_path / "saved", loaded, memory={"top_k": 2})
    assert again.memory_config.top_k == 2
    assert not torch.equal(read(again), read(model))


def test_a_base_that_was_trained_is_not_lost_without_a_word(home: Path, tmp_path: Path) -> None:
    model = memorized(home / "base")
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model.base.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(ConfigError, match=r"^base = .*base': .*base\.save_pretrained") as caught:
        model.save_pretrained(tmp_path / "after")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("train", KINDS)
def test_a_checkpoint_becomes_a_folder_and_both_are_the_trained_model(
    home: Path, tmp_path: Path, train: str
) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    module, _ = fit(home, tmp_path, steps=3, train=train)
    net = module.net
    assert isinstance(net, MemorizedModel)
    net.eval()
    expected = read(net)
    model = load_model(tmp_path / "step=3.ckpt")
    assert isinstance(model, MemorizedModel)
    assert torch.equal(read(model), expected)
    model.save_pretrained(tmp_path / "saved")
    found = MemorizedModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(read(found), expected)
    assert found.tokenizer("abcd").input_ids == module.tokenizer("abcd").input_ids


def test_the_commands_export_and_inspect_a_checkpoint(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    fit(home, tmp_path, steps=3)
    checkpoint, document = tmp_path / "step=3.ckpt", tmp_path / "document.txt"
    document.write_text("abcd efgh ijkl mnop qrst uvwx " * 20, "utf-8")
    run_command(monkeypatch, "export", "--ckpt_path", checkpoint, "--out", tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        SETTINGS,
        WEIGHTS,
        "tokenizer",
    ]
    for place in (checkpoint, tmp_path / "model"):
        out = tmp_path / f"{place.stem}-read"
        options = ["--document", document, "--out", out, "--segment_length", 16]
        run_command(monkeypatch, "inspect", "--ckpt_path", place, *options)
    lines, again = (
        (tmp_path / f"{name}-read" / "tokens.jsonl").read_text() for name in ("step=3", "model")
    )
    assert lines == again
    rows = [json.loads(line) for line in lines.splitlines()]
    assert "".join(row["text"] for row in rows).strip() == document.read_text().strip()
    assert any(row["retrieved"]["64"] for row in rows)
    assert f"report: {tmp_path / 'model-read' / 'index.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [[5], [-1, 4], None], ids=str)
def test_a_base_may_have_more_layers_than_our_own_models(
    home: Path, tmp_path: Path, layers: list[int] | None
) -> None:
    module, _ = fit(home, tmp_path, steps=3, base="deep", memory={"layers": layers})
    net = module.net
    assert isinstance(net, MemorizedModel)
    if layers is not None:
        assert net.memory_layers == tuple(sorted(layer % 7 for layer in layers))
    expected = read(net.eval())  # type: ignore[arg-type]
    assert torch.equal(read(load_model(tmp_path / "step=3.ckpt")), expected)  # type: ignore[arg-type]
    fit(home, tmp_path / "b", 4, tmp_path / "step=3.ckpt", base="deep", memory={"layers": layers})
    with pytest.raises(ConfigError, match=r"model\.memory\.layers = \[7\]"):
        fit(home, tmp_path, base="deep", memory={"layers": [7]})


def test_another_base_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    memorized(home / "base").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^base = .*other': has other weights"):
        MemorizedModel.from_pretrained(tmp_path, home / "other")
    with pytest.raises(ConfigError, match=r"^base = "):
        MemorizedModel.from_pretrained(tmp_path, tiny("gpt2"))
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "base": "nowhere"}))
    with pytest.raises(ConfigError, match=r"base = .*nowhere"):
        MemorizedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "no folder", "cut off", "other weights", "no settings"])
def test_a_folder_that_cannot_be_read_is_named(home: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "saved"
    memorized(home / "base").save_pretrained(folder)
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "no folder":
        shutil.rmtree(folder)
        folder.write_text("")
    elif damage == "cut off":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])
    elif damage == "other weights":
        settings = json.loads((folder / SETTINGS).read_text())
        settings["memory"]["temperature"] = False
        (folder / SETTINGS).write_text(json.dumps(settings))
    else:
        (folder / SETTINGS).write_text("{}")
    with pytest.raises(ConfigError, match=r"^folder = ") as caught:
        MemorizedModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^save_pretrained = .*file"):
        memorized(home / "base").save_pretrained(tmp_path / "file")


def test_the_other_class_says_which_one_reads_the_folder(home: Path, tmp_path: Path) -> None:
    memorized(home / "base").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"MemorizedModel\.from_pretrained"):
        MemorizingTransformer.from_pretrained(tmp_path)


def test_a_base_in_another_dtype_comes_back_as_it_was(home: Path, tmp_path: Path) -> None:
    half, whole = (
        memorize(AutoModelForCausalLM.from_pretrained(home / "base", dtype=dtype), SIZES, [1])
        for dtype in (torch.bfloat16, torch.float32)
    )
    half.eval().save_pretrained(tmp_path / "half")
    whole.eval().save_pretrained(tmp_path / "whole")
    for folder, options in (("half", {}), ("whole", {"dtype": "bfloat16"})):
        found = MemorizedModel.from_pretrained(tmp_path / folder, **options)
        assert next(found.base.parameters()).dtype == torch.bfloat16
        assert torch.equal(read(found), read(half))
        found.save_pretrained(tmp_path / "again")
        assert torch.equal(read(MemorizedModel.from_pretrained(tmp_path / "again")), read(half))
    # Files of earlier versions do not say it.
    settings = json.loads((tmp_path / "whole" / SETTINGS).read_text())
    del settings["dtype"]
    (tmp_path / "whole" / SETTINGS).write_text(json.dumps(settings))
    assert torch.equal(read(MemorizedModel.from_pretrained(tmp_path / "whole")), read(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"memory": None},
        {"adapt": []},
        {"memory": {"sise": 8}},
        {"memory": {"size": "8"}},
        {"adapt": {"trane": "all"}},
    ],
    ids=str,
)
def test_settings_that_are_none_are_named(
    home: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    memorized(home / "base").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    for text in (json.dumps({**settings, **change}), "[]", "5"):
        (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(ConfigError, match=r"^folder = ") as caught:
            MemorizedModel.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
