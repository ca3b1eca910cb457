"""The pages of TensorBoard: which come first, and what stands on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small import Run, command, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from memorizing_transformers.training.tensorboard import FIRST, RunLogger, flat_settings


@pytest.fixture(scope="module")
def events(run: Run) -> EventAccumulator:
    events = EventAccumulator(str(run.folder))
    events.Reload()
    return events


def test_perplexity_comes_first(events: EventAccumulator) -> None:
    """TensorBoard sorts groups by their names, capitals first, and opens the first two."""
    tags = events.Tags()
    groups = {
        tag.partition("/")[0] for kind in ("scalars", "images", "histograms") for tag in tags[kind]
    }
    assert sorted(groups)[:2] == [FIRST, "memory"]
    assert groups >= {"train", "val", "staleness", "time", "throughput", "trainer"}
    assert all("/" in tag for tag in tags["scalars"])
    shown = [tag for tag in tags["scalars"] if tag.startswith(FIRST)]
    assert sorted(shown) == [f"{FIRST}/train", f"{FIRST}/val"]


def test_the_first_curves_are_those_of_the_contract(run: Run) -> None:
    curves = scalars(run.folder)
    for split in ("train", "val"):
        assert curves[f"{FIRST}/{split}"] == curves[f"{split}/perplexity"]
    assert set(curves["trainer/epoch"].values()) <= {*range(10)}


def test_settings_stand_beside_final_figures(run: Run, events: EventAccumulator) -> None:
    def plugin(tag: str) -> bytes:
        return events.SummaryMetadata(tag).plugin_data.content

    started = metadata.parse_session_start_info_plugin_data(plugin(metadata.SESSION_START_INFO_TAG))
    settings = {
        key: value.string_value or value.number_value for key, value in started.hparams.items()
    }
    assert settings["model.memory.size"] == 32
    assert settings["model.memory.combine"] == "gate"
    assert settings["model.memory.layers"] == "[-1]"
    assert settings["model.optimizer.lr"] == 1e-2
    assert settings["model.qk_norm"] == "true"
    assert settings["data.segment_length"] == 16
    assert settings["trainer.max_steps"] == 24
    assert not any("callbacks" in key or "logger" in key for key in settings)
    # Without an experiment TensorBoard puts first what differs between runs, by their own curves.
    assert metadata.EXPERIMENT_TAG not in events.Tags()["tensors"]
    curves = scalars(run.folder)
    assert [*curves["val/perplexity"]] == [7, 15, 23]  # the run's own; nothing added


def test_every_chart_has_curves(run: Run, events: EventAccumulator) -> None:
    (config,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    assert [category.title for category in layout.category] == ["Perplexity", "Memory", "Time"]
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            assert [tag for tag in tags if re.search(pattern, tag)], chart.title


def test_settings_are_flat_and_readable() -> None:
    given = {
        "model.memory.size": 8,
        "model.memory.layers": [1, 2],
        "model.qk_norm": True,
        "data.source": "stdlib",
        "data.eval_rows": None,
        "data.cache_dir": "data/cache",
        "trainer.callbacks": [object()],
        "trainer.max_steps": 5,
        "ckpt_path": "last",
    }
    assert flat_settings(given) == {
        "model.memory.size": 8,
        "model.memory.layers": "[1, 2]",
        "model.qk_norm": True,
        "data.source": "stdlib",
        "trainer.max_steps": 5,
    }


def test_metrics_given_with_settings_become_scalars(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, name="", version="run")
    logger.log_hyperparams({"model.memory.size": 8}, {"test/perplexity": 3.0}, step=7)
    logger.finalize("success")
    found = scalars(tmp_path / "run")
    assert found == {"test/perplexity": {7: 3.0}, f"{FIRST}/test": {7: 3.0}}


@pytest.mark.parametrize("loggers", ["CSVLogger", "[CSVLogger,TensorBoardLogger]", "false"])
def test_other_loggers_work_from_the_command_line(
    config: Path, tmp_path: Path, loggers: str
) -> None:
    names = [name for name in ("CSVLogger", "TensorBoardLogger") if name in loggers]
    entries = [
        {
            "class_path": f"lightning.pytorch.loggers.{name}",
            "init_args": {"save_dir": str(tmp_path)},
        }
        for name in names
    ]
    value = str(entries).replace("'", '"') if entries else "false"
    extra = tmp_path / "logger.yaml"
    extra.write_text(f"trainer:\n  logger: {value}\n")
    args = ["--trainer.max_steps", "9", "--final_report", "false"]
    code, _, error = command("fit", "--config", config, "--config", extra, *args)
    assert code == 0, error
    written = [path.name for path in (tmp_path / "lightning_logs").rglob("metrics.csv")]
    assert bool(written) == ("CSVLogger" in loggers)
