"""From a checkpoint to a model that needs no trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import SEGMENT, Run, make_data

from memorizing_transformers import MemorizingTransformer
from memorizing_transformers.__main__ import main
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import UserError
from memorizing_transformers.training.checkpoint.export import (
    is_packed,
    load_model,
    pack_tokenizer,
    unpack_tokenizer,
)

TEXT = "def answer():\n\treturn 'naïve 42'  # ✓"


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", *map(str, args)])
    main()


@pytest.fixture
def bpe(texts: Path):
    return make_data(texts, tokenizer="bpe", bpe_vocab_size=300).text_tokenizer


def test_a_packed_tokenizer_comes_back(bpe) -> None:
    for tokenizer in (byte_tokenizer(), bpe):
        files = pack_tokenizer(tokenizer)
        assert all(content.dtype == torch.uint8 for content in files.values())
        again = unpack_tokenizer(files)
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.decode(again.encode(TEXT)) == TEXT
        assert is_packed(files, tokenizer)


def test_another_tokenizer_is_not_the_packed_one(bpe) -> None:
    assert not is_packed(pack_tokenizer(bpe), byte_tokenizer())
    assert not is_packed(pack_tokenizer(byte_tokenizer()), bpe)


def test_a_packed_name_cannot_leave_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "down").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "deep" / "down"))
    files = pack_tokenizer(byte_tokenizer())
    files["../../escaped"] = torch.zeros(3, dtype=torch.uint8)
    unpack_tokenizer(files)
    assert not [*tmp_path.rglob("escaped")]


def test_the_exported_model_is_the_trained_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call(monkeypatch, "export", "--ckpt_path", run.checkpoint, "--out", tmp_path / "model")
    assert f"model: {tmp_path / 'model'}" in capsys.readouterr().out
    exported = MemorizingTransformer.from_pretrained(tmp_path / "model").eval()
    loaded = load_model(run.checkpoint)
    trained = run.cli.model.net.eval()
    assert exported.tokenizer.encode(TEXT) == list(TEXT.encode())
    assert loaded.tokenizer.encode(TEXT) == list(TEXT.encode())
    banks = [net.new_memory(2) for net in (trained, loaded, exported)]
    for ids in torch.randint(0, 256, (2, 5 * SEGMENT)).split(SEGMENT, 1):
        outputs = []
        for net, bank in zip((trained, loaded, exported), banks, strict=True):
            with torch.no_grad():
                outputs.append(net(ids, bank))
            bank.commit(outputs[-1].pairs)
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        assert torch.equal(outputs[0].logits, outputs[2].logits)


def test_loading_may_change_one_setting_of_the_memory(run: Run) -> None:
    model = load_model(run.checkpoint, memory={"size": 512}, xl_cache=8)
    assert not model.training
    assert model.config.memory.size == model.new_memory(1).memories[1].size == 512
    assert (model.config.memory.top_k, model.config.memory.layers) == (4, [-1])
    assert model.new_memory(1).caches[0].size == 8


def test_what_is_no_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_text("hello")
    (tmp_path / "folder.ckpt").mkdir()
    for name in ("nowhere.ckpt", "file.ckpt", "folder.ckpt"):
        with pytest.raises(UserError, match="ckpt_path"):
            load_model(tmp_path / name)


def test_export_tells_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for args in (
        ("export", "--ckpt_path", tmp_path / "nowhere.ckpt", "--out", tmp_path / "model"),
        ("export", "--ckpt_path", tmp_path),
        ("exprot",),
    ):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *args)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert not (tmp_path / "model").exists()


def test_prepare_tokenises_ahead_of_a_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, texts: Path
) -> None:
    call(monkeypatch, "prepare", "--config", run.config)
    out = capsys.readouterr().out
    assert str(make_data(texts).store_folder) in out
    assert "train: 8 documents" in out


def test_prepare_and_estimate_take_several_configs(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model.d_model: 32\ndata:\n  segment_length: 32\n")
    two.write_text("data: {segment_length: 64}\n")
    both = tmp_path / "both.yaml"
    both.write_text(f"config: {run.config}\nmodel.d_model: 32\ndata.segment_length: 64\n")

    def printed(*args: object) -> str:
        call(monkeypatch, *args)
        return capsys.readouterr().out

    for name in ("prepare", "estimate"):
        alone = printed(name, "--config", run.config)
        found = printed(name, "--config", run.config, "--config", one, f"--config={two}")
        assert found == printed(name, "--config", both) != alone
        assert printed(name, "--config", one, "--config", run.config) != found
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, name)
        assert stop.value.code == 2
        assert "config" in capsys.readouterr().err
