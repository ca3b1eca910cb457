"""The command line: what it runs, and what it saves."""

from __future__ import annotations

import logging
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import SEGMENT, Run, by_hand, command, make_data, scalars

from memorizing_transformers.model import MemoryConfig, ModelConfig, Transformer
from memorizing_transformers.training.checkpoint.export import load_model
from memorizing_transformers.training.module import MemorizingLM
from memorizing_transformers.training.run_folders import versions

TRAIN = Path(__file__).parents[2] / "train.py"


class Watched:
    """What a run of ``test`` does with its memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: set[int] = set()
        self.oldest = 0
        """Age in tokens of the oldest retrieved pair."""
        commit = MemorizingLM.commit

        def watch(module: Any, stage: str, batch: Any, output: Any) -> None:
            for layer, memory in module.banks[stage].memories.items():
                self.sizes.add(memory.size)
                found = output.retrievals[layer]
                row = torch.arange(len(found.slots))[:, None, None, None].expand_as(found.slots)
                ages = memory.age()[row[found.valid], found.slots[found.valid]] + 1
                self.oldest = max(self.oldest, *ages.tolist(), 0)
            commit(module, stage, batch, output)

        monkeypatch.setattr(MemorizingLM, "commit", watch)


def figures_of(run: Run, *args: Any) -> dict[str, float]:
    """The figures that ``test`` logs for the run's checkpoint."""
    code, *_ = command("test", "--config", run.config, "--ckpt_path", "last", *args)
    assert code == 0
    newest = versions(run.root / "test")[-1]
    figures = {name: [*values.values()] for name, values in scalars(newest).items()}
    return {name.removeprefix("test/"): v[0] for name, v in figures.items() if "test/" in name}


def test_a_larger_memory_can_be_tested_than_was_trained(
    run: Run, monkeypatch: pytest.MonkeyPatch, texts: Path
) -> None:
    store = make_data(texts).test_store
    found = {}
    for size in (32, 512):
        watched = Watched(monkeypatch)
        found[size] = figures_of(run, f"--model.memory.size={size}")
        assert watched.sizes == {size}
        assert (watched.oldest > 32) == (size > 32)
        expected = by_hand(load_model(run.checkpoint, memory={"size": size}), store)
        assert found[size] == pytest.approx({**found[size], **expected}, rel=1e-5)
    assert found[32]["perplexity"] != pytest.approx(found[512]["perplexity"], rel=1e-4)


def test_a_memory_switched_off_gives_the_figures_of_a_plain_model(run: Run, texts: Path) -> None:
    weights = load_model(run.checkpoint).state_dict()
    plain = Transformer(
        ModelConfig(256, 16, num_layers=2, num_heads=2, memory=MemoryConfig(layers=[]))
    )
    missing = plain.load_state_dict(weights, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (
        [],
        ["layers.1.attention.reader.gate.logit"],
    )
    expected = by_hand(plain, make_data(texts).test_store)
    found = figures_of(run, "--model.memory.size=0")
    assert found == pytest.approx({**found, **expected}, rel=1e-5)


def test_keys_win_over_the_config_wherever_they_stand(config: Path) -> None:
    key, file = "--trainer.max_steps=3", f"--config={config}"
    for args in ((key, file), (file, key), (key, "-c", config)):
        _, out, _ = command("fit", *args, "--print_config")
        assert yaml.safe_load(out)["trainer"]["max_steps"] == 3


def test_a_later_config_wins_over_an_earlier_one(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("trainer:\n  max_steps: 5\n")
    for files, expected in (((config, other), 5), ((other, config), 24)):
        args = [part for file in files for part in ("--config", file)]
        printed = yaml.safe_load(command("fit", *args, "--print_config")[1])
        assert printed["trainer"]["max_steps"] == expected


def test_a_config_may_name_the_config_that_it_changes(config: Path, tmp_path: Path) -> None:
    """By a path from its own folder; keys that it leaves alone are the base's, lists too."""
    (tmp_path / "deeper").mkdir()
    middle, top = tmp_path / "middle.yaml", tmp_path / "deeper" / "top.yaml"
    middle.write_text(f"config: {config.name}\ntrainer.max_steps: 5\nmodel.memory.top_k: 3\n")
    top.write_text("config: ../middle.yaml\nmodel.memory.top_k: 2\ndata.batch_rows: 2\n")
    assert config.parent == tmp_path
    keys = ["--trainer.max_steps=5", "--model.memory.top_k=2", "--data.batch_rows=2"]
    expected = command("fit", "--config", config, *keys, "--print_config")
    assert command("fit", "--config", top, "--print_config") == expected
    _, printed, _ = command("fit", "--config", config, "--config", top, "--print_config")
    assert printed == expected[1]


def test_a_class_takes_the_place_of_the_one_of_the_base(config: Path, tmp_path: Path) -> None:
    top, loggers = tmp_path / "top.yaml", "lightning.pytorch.loggers"
    logger = f"{{class_path: {loggers}.CSVLogger, init_args: {{save_dir: there}}}}"
    top.write_text(f"config: {config.name}\ntrainer.logger: {logger}\n")
    printed = yaml.safe_load(command("fit", "--config", top, "--print_config")[1])
    assert printed["trainer"]["logger"]["class_path"] == f"{loggers}.CSVLogger"
    assert printed["trainer"]["logger"]["init_args"]["save_dir"] == "there"
    assert printed["trainer"]["max_steps"] == 24


def test_the_printed_config_can_be_fed_back(config: Path, tmp_path: Path) -> None:
    code, printed, _ = command("fit", "--config", config, "--print_config")
    assert code == 0
    settings = yaml.safe_load(printed)
    assert settings["model"]["memory"]["top_k"] == 4
    assert settings["data"]["segment_length"] == SEGMENT
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert command("fit", "--config", again, "--print_config") == (0, printed, "")


def test_the_run_keeps_the_config_that_it_used(run: Run) -> None:
    def check(given: Any, saved: Any, key: str) -> None:
        if isinstance(given, dict):
            for name, value in given.items():
                check(value, saved[name], f"{key}.{name}")
        elif key != ".trainer.callbacks":  # their defaults are spelt out
            assert saved == given, key

    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    check(yaml.safe_load(run.config.read_text()), saved, "")
    assert saved["trainer"]["callbacks"][0]["init_args"]["save_last"] is True
    assert saved["model"]["memory"]["combine"] == "gate"  # a default, resolved
    _, printed, _ = command("fit", "--config", run.folder / "config.yaml", "--print_config")
    assert (
        yaml.safe_load(printed) == {**saved, "ckpt_path": None} or yaml.safe_load(printed) == saved
    )


def test_other_commands_leave_the_runs_config_alone(run: Run) -> None:
    before = (run.folder / "config.yaml").read_bytes()
    assert command("validate", "--config", run.config, "--ckpt_path", "last")[0] == 0
    assert (run.folder / "config.yaml").read_bytes() == before
    assert not [*(run.root / "validate").rglob("config.yaml")]


def test_curves_are_in_tensorboard(run: Run) -> None:
    curves = scalars(run.folder)
    logged, validated, observed = [3, 7, 11, 15, 19, 23], [7, 15, 23], [0, 8, 16]
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        assert [*curves[f"train/{name}"]] == logged
        assert [*curves[f"val/{name}"]] == validated
    assert [*curves["throughput/tokens_per_second"]] == logged
    assert [*curves["trainer/learning_rate"]] == logged
    for name in ("memory/fill/layer1", "memory/share/layer1", "memory/gate/layer1_head1"):
        assert [*curves[name]] == observed
    for name in ("memory/stored_age_steps", "memory/retrieved_age_tokens", "staleness/key_cosine"):
        assert [*curves[f"{name}/layer1"]] == observed[1:]
    for split, steps in (("train", logged), ("val", validated)):
        for step in steps:
            loss = curves[f"{split}/loss"][step]
            assert curves[f"{split}/perplexity"][step] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"]])
def test_help_is_useful(args: list[str]) -> None:
    code, out, _ = command(*args)
    assert code == 0
    if args[0] == "fit":
        for key in ("model.memory.size", "model.memory.top_k", "data.source", "final_report"):
            assert f"--{key}" in out
        assert "0 switches the memory off" in " ".join(out.split())
    else:
        for name in ("fit", "validate", "test", "predict"):
            assert name in out


def test_train_py_is_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--model.memory.topk=3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert stop.value.code == 2
    assert "did you mean model.memory.top_k?" in capsys.readouterr().err


def test_lightnings_advertising_is_left_out(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning").setLevel(logging.INFO)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level("INFO", logger=log.name):
        assert command("fit", "--config", config, "--trainer.fast_dev_run=true")[0] == 0
    assert "GPU available" in caplog.text
    assert "Tip" not in caplog.text


def test_untrained_weights_are_not_tested_in_silence(config: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert command("test", "--config", config)[0] == 0
    assert any("ckpt_path: none given" in str(warning.message) for warning in caught)
