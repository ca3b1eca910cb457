"""Every shipped config builds through the command line's own class, and is what its name says."""

from __future__ import annotations

from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memorizing_transformers.model import Transformer
from memorizing_transformers.training.cli import MemoryCLI
from memorizing_transformers.training.optimizers import make_optimizer, make_schedule

ROOT = Path(__file__).parent.parent
OTHERS = ("ablations", "corpora")
"""Plans, which tests/studies/test_ablation_plan.py builds, and overlays: tests/test_corpora.py."""
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in OTHERS)
ALL_KEYS = ROOT / "configs" / "all-keys.yaml"
RUNS = [path for path in CONFIGS if path != ALL_KEYS]
CHANGES = [path for path in CONFIGS if "config" in yaml.safe_load(path.read_text())]
"""Configs that name the config that they change."""
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
T5_SMALL_VOCABULARY = 32_100
ON_THIS_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32"]

# Table 4 of the paper: segment, memory, XL cache.
TABLE_4 = [
    (512, 0, 0),
    (2048, 0, 0),
    (512, 0, 512),
    (2048, 0, 2048),
    (512, 1536, 0),
    (512, 8192, 0),
    (512, 8192, 512),
    (512, 65536, 512),
    (2048, 8192, 2048),
    (2048, 65536, 2048),
]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where arguments stand beside pytest's own.
    monkeypatch.setattr("sys.argv", ["train.py"])


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights that are never written take no memory and no time, whatever the model's size.
    for name in ("kaiming_uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda weight, *args, **kwargs: weight)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


def build(path: Path, *keys: str) -> MemoryCLI:
    return MemoryCLI(args=["--config", str(path), *ON_THIS_MACHINE, *keys], run=False)


def network(cli: MemoryCLI) -> Transformer:
    if cli.model.config.vocab_size is None:
        cli.model.config.vocab_size = T5_SMALL_VOCABULARY
    return Transformer(cli.model.config)


class ParseOnly(MemoryCLI):
    """Takes a config apart and stops there."""

    def instantiate_classes(self) -> None:
        pass


def settings(*paths: Path) -> dict[str, Any]:
    """Every value of a config by its dotted key, defaults too."""
    args = [f"--config={path}" for path in paths]
    found = vars(ParseOnly(args=args, run=False).config.as_flat())
    return {key: value for key, value in found.items() if key != "config"}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[1:]: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}.{key}").items()}


def differences(one: Path, other: Path) -> set[str]:
    a, b = settings(one), settings(other)
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_builds_model_data_and_optimizer(path: Path) -> None:
    # The keys of the project alone set no end of training.
    cli = build(path, *(["--trainer.max_steps=10"] if path == ALL_KEYS else []))
    model = network(cli)
    optimizer = make_optimizer(model, cli.model.optimizer_config)
    make_schedule(optimizer, cli.model.optimizer_config, cli.trainer.max_steps)
    assert cli.datamodule.batch_rows > 0


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_header_names_the_command(path: Path) -> None:
    header = [*takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())]
    command = f"python train.py fit --config {path.relative_to(ROOT).as_posix()}"
    assert f"#   {command}" in header
    assert any("cores" in line for line in header)
    assert any("perplexity" in line.lower() for line in header)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_folder_is_named_after_the_config(path: Path) -> None:
    assert settings(path)["trainer.default_root_dir"] == f"runs/{name_of(path)}"


@pytest.mark.parametrize("path", CHANGES, ids=name_of)
def test_a_change_says_what_it_changes_and_repeats_nothing(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    base = path.parent / given.pop("config")
    assert differences(base, path) <= given.keys()
    said = flat(yaml.safe_load(base.read_text()))
    assert not [key for key, value in given.items() if said.get(key) == value]


def test_all_keys_are_given_with_their_defaults() -> None:
    given = flat(yaml.safe_load(ALL_KEYS.read_text()))
    assert settings(ALL_KEYS) == settings()
    own = {key for key in settings() if key.split(".")[0] != "trainer"}
    assert given.keys() >= own
    assert {"trainer.background_save", "trainer.rank_timeout"} <= given.keys()


def test_configs_that_share_most_lines_name_one_another() -> None:
    complete = [path for path in RUNS if path not in CHANGES]
    for one, other in combinations(complete, 2):
        a, b = (
            {line for line in path.read_text().splitlines() if line.lstrip()[:1] != "#"}
            for path in (one, other)
        )
        assert len(a & b) < min(len(a), len(b)) / 2, (one, other)


def test_control_differs_from_the_quickstart_in_its_memory_alone() -> None:
    control = ROOT / "configs" / "no_memory.yaml"
    allowed = {"model.memory.layers", "trainer.default_root_dir"}
    assert differences(ROOT / "configs" / "quickstart.yaml", control) == allowed
    assert build(control).model.config.memory_layers == ()


def test_the_papers_recipe_differs_from_the_quickstart_in_its_recipe_alone() -> None:
    paper = ROOT / "configs" / "paper_recipe.yaml"
    recipe = {
        "model.memory.copy",
        "model.memory.gate_init",
        "model.optimizer.memory_lr_factor",
    }
    allowed = recipe | {"trainer.default_root_dir"}
    assert differences(ROOT / "configs" / "quickstart.yaml", paper) == allowed
    defaults = settings(ALL_KEYS)
    assert all(settings(paper)[key] == defaults[key] for key in recipe)


def test_ddp_is_the_quickstart_on_two_processes() -> None:
    ddp = ROOT / "configs" / "ddp.yaml"
    allowed = {"trainer.devices", "trainer.strategy", "trainer.default_root_dir"}
    assert differences(ROOT / "configs" / "quickstart.yaml", ddp) == allowed
    found = settings(ddp)
    assert int(found["data.batch_rows"]) % int(found["trainer.devices"]) == 0


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_lists_what_it_logs(path: Path) -> None:
    kinds = {type(callback).__name__ for callback in build(path).trainer.callbacks}
    assert kinds >= {"RetrievalLogging", "RetrievalHistograms", "RetrievalSamples"}
    assert kinds >= {"LossByPosition", "StepTiming", "Throughput", "ModelCheckpoint"}


def test_there_is_one_paper_config_per_row_of_table_4() -> None:
    found = []
    for path in PAPER:
        cli = build(path)
        size = cli.model.config.memory.size if cli.model.config.memory_layers else 0
        found.append((cli.datamodule.segment_length, size, cli.model.config.xl_cache))
        segment, memory, xl = found[-1]
        parts = (f"mem{memory}" if memory else "nomem", f"xl{xl}" if xl else "noxl")
        assert path.stem == "_".join((f"seg{segment}", *parts))
    assert sorted(found) == sorted(TABLE_4)


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_config_has_the_published_sizes(path: Path) -> None:
    cli = build(path)
    config, optimizer = cli.model.config, cli.model.optimizer_config
    assert cli.datamodule.batch_rows * cli.datamodule.segment_length == 2**17
    assert cli.trainer.max_steps == 500_000
    assert (optimizer.name, optimizer.lr, optimizer.schedule) == ("adafactor", 1.0, "rsqrt")
    assert (optimizer.warmup_steps, optimizer.weight_decay) == (1000, 0.0)
    assert (config.num_layers, config.d_model, config.ff_width) == (12, 1024, 4096)
    assert (config.num_heads, config.kv_heads, config.head_width) == (8, 8, 128)
    assert config.memory_layers in ((), (8,))
    if config.memory_layers:
        assert (config.memory.top_k, config.memory.combine) == (32, "gate")
        assert config.memory.dtype == "bfloat16"

    model = network(cli)
    body = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    assert body == pytest.approx(151.0e6, rel=0.001)


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_learning_rate_is_the_published_one(path: Path) -> None:
    cli = build(path)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    holder = torch.nn.ParameterList([parameter])
    optimizer = make_optimizer(holder, cli.model.optimizer_config)
    schedule = make_schedule(optimizer, cli.model.optimizer_config, cli.trainer.max_steps)
    rate = schedule.lr_lambdas[0]
    assert rate(1_000) == pytest.approx(0.0316, abs=1e-4)
    assert rate(500_000) == pytest.approx(0.00141, abs=1e-5)
