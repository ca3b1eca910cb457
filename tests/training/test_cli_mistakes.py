"""How the command line speaks of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import Run, command, make_data


def error_of(*args: Any) -> str:
    """The one line that a mistake gets."""
    code, out, err = command(*args)
    assert code == 2
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.memory.sise=3", "did you mean model.memory.size?"),
        ("--modle.memory.size=3", "did you mean model.memory.size?"),
        ("--trainer.max_step=3", "did you mean trainer.max_steps?"),
        ("--batch_rows=3", "did you mean data.batch_rows?"),
        ("--model.memory.size=big", "model.memory.size"),
        ("--model.memory.size=-1", "model.memory.size = -1: must be at least 0"),
        ("--model.memory.top_k=33", "model.memory.top_k = 33: must be at most model.memory.size"),
        ("--model.memory.layers=[2]", "model.memory.layers = [2]: each must lie between 0 and 1"),
        ("--model.num_heads=3", "model.num_heads = 3: must divide model.d_model (16)"),
        ("--model.num_kv_heads=3", "model.num_kv_heads = 3: must divide model.num_heads (2)"),
        ("--model.memory.combine=sum", "'gate', 'fixed', 'content', 'joint'"),
        ("--model.optimizer.betas=[0.9,1.5]", "model.optimizer.betas = (0.9, 1.5): each must lie"),
        ("--data.segment_length=0", "data.segment_length = 0: must be at least 1"),
        ("--data.source=nowhere.txt", "data.source = 'nowhere.txt': no such file or folder"),
        ("--trainer.devices=0", "devices='0'"),
        ("--trainer.strategy=magic", "trainer: You selected an invalid strategy name"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches = 0: must be 1"),
        ("--trainer.default_root_dir=null", "trainer.default_root_dir = None: must name a folder"),
        ("--trainer.default_root_dir=/dev/null/runs", "'/dev/null/runs': cannot be written"),
        ("--seed_everything=-1", "seed_everything = -1: must lie in"),
        ("--ckpt_path=nowhere.ckpt", "ckpt_path = 'nowhere.ckpt': there is no such"),
        ("--ckpt_path=last", "ckpt_path = 'last': no checkpoint in"),
        ("--config=nowhere.yaml", "File does not exist: '"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_written(
    config: Path, argument: str, message: str
) -> None:
    assert message in error_of("fit", "--config", config, argument)
    assert [*config.parent.iterdir()] == [config]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {memory: {sise: 3}}", "'model.memory.sise'; did you mean model.memory.size?"),
        ("data: {bach_rows: 3}", "'data.bach_rows'; did you mean data.batch_rows?"),
        ("trainr: {max_steps: 3}", "'trainr.max_steps'; did you mean trainer.max_steps?"),
        ("model: [1", "Problems parsing config"),
    ],
)
def test_a_mistake_in_a_file_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text + "\n")
    assert message in error_of("fit", "--config", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: base.yaml\ntrainer: {max_steps: 3}", "give trainer.max_steps: ..."),
        ("config: base.yaml\nmodel.memory: {size: 3}", "give model.memory.size: ..."),
        ("config: base.yaml\ntrainer.callbacks+: []", "the complete list as trainer.callbacks"),
        ("trainer.max_steps: 3\nconfig: base.yaml", "first key of its file, not below trainer.max"),
        ("config: [base.yaml]", "config = ['base.yaml']: must be the path of one file"),
        ("config: nowhere.yaml", "File does not exist: '"),
        ("config: over.yaml", "loop detected"),
    ],
)
def test_what_a_base_would_lose_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text("trainer: {devices: 1}\nmodel.memory.top_k: 3\n")
    (tmp_path / "over.yaml").write_text(text + "\n")
    assert message in error_of("fit", "--config", tmp_path / "over.yaml")


def test_no_subcommand_and_a_wrong_one_get_one_line() -> None:
    for args in ([], ["fitt"]):
        line = error_of(*args)
        assert all(name in line for name in ("fit", "validate", "test", "predict"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.d_model=32", "model.d_model = 32 (checkpoint: 16)"),
        ("--model.memory.layers=[0]", "model.memory.layers = [0] (checkpoint: [1])"),
        ("--model.memory.layers=[]", "model.memory.layers = [] (checkpoint: [1])"),
        ("--model.memory.combine=joint", "model.memory.combine = joint (checkpoint: gate)"),
        ("--data.tokenizer=bpe", "model.vocab_size"),
        ("--data.test_fraction=0", "data.test_fraction = 0: there are no documents for test"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_one_line(
    run: Run, argument: str, message: str
) -> None:
    args = ("test", "--config", run.config, "--ckpt_path", run.checkpoint, argument)
    assert message in error_of(*args)


def test_a_checkpoint_of_another_tokenizer_gets_one_line(run: Run, tmp_path: Path) -> None:
    # As many tokens, but other ids.
    swapped = make_data(run.config.parent).text_tokenizer
    folder = tmp_path / "tokenizer"
    swapped.save_pretrained(folder)
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(rules))
    args = ("test", "--config", run.config, "--ckpt_path", "last", f"--data.tokenizer={folder}")
    assert "data.tokenizer: not the checkpoint's tokenizer" in error_of(*args)


@pytest.mark.parametrize("name", ["file.ckpt", "folder.ckpt"])
def test_what_is_no_checkpoint_gets_one_line(config: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file.ckpt").write_text("hello")
    (tmp_path / "folder.ckpt").mkdir()
    line = error_of("test", "--config", config, "--ckpt_path", tmp_path / name)
    assert line.startswith("ckpt_path")
    assert name in line


def test_a_loss_that_is_no_number_ends_with_one_line(config: Path) -> None:
    line = error_of("fit", "--config", config, "--model.optimizer.lr=1e30")
    assert line.startswith("train/loss = nan at step ")
    assert "model.optimizer.lr (now 1e+30)" in line


def test_cosine_without_an_end_gets_one_line(config: Path) -> None:
    args = ("--trainer.max_steps=-1", "--trainer.max_epochs=1")
    line = error_of("fit", "--config", config, *args)
    assert line.startswith("model.optimizer.total_steps = None: cosine needs an end")
