"""The README's Python runs, and its commands name configs, targets and keys that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers.__main__ import all_commands
from memorizing_transformers.training.cli import MemoryCLI

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ORIGIN = """\
from memorizing_transformers import MemorizingTransformer
model = MemorizingTransformer()
input_text = "The quick brown fox jumps over the lazy dog"
tokenized = model.tokenizer(input_text)
output = model(tokenized)
"""


SHELL = ("printf", "cat")
TRAINING = ("python train.py", "torchrun --nproc_per_node 2 train.py", "srun python train.py")
"""How a training command may begin."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The arguments of every shown command that begins with ``program``."""
    shown = "".join(blocks("bash") + blocks("sh")).replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in shown.split("\n")]
    first = program.split()
    return [line[len(first) :] for line in lines if line[: len(first)] == first]


class ParseOnly(MemoryCLI):
    """Takes a command line apart as ``train.py`` does, and stops there."""

    def _parse_ckpt_path(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_every_command_is_of_a_known_kind() -> None:
    known = ("make", *TRAINING, "python -m memorizing_transformers", "tensorboard", *SHELL)
    shown = sum(bool(line.strip()) for block in blocks("bash") for line in block.split("\n"))
    shown += len(blocks("sh"))  # one command each
    assert sum(len(commands(program)) for program in known) == shown


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_runs(code: str) -> None:
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["output"].logits.shape[-1] == 256


def test_the_snippet_of_the_projects_origin_is_shown_as_it_stands() -> None:
    assert ORIGIN in blocks("python")
    names: dict[str, Any] = {}
    exec(ORIGIN, names)
    assert names["output"].logits.shape == (1, 43, 256)


@pytest.mark.parametrize("target", commands("make"), ids=" ".join)
def test_make_targets_exist(target: list[str]) -> None:
    assert re.search(rf"^{target[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("arguments", [a for p in TRAINING for a in commands(p)], ids=" ".join)
def test_training_commands_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    if {"--help", "--print_config"} & set(arguments):
        with pytest.raises(SystemExit) as left:
            ParseOnly()
        assert left.value.code in (0, None)
    else:
        config = ParseOnly().config[arguments[0]]
        assert config.seed_everything is not None


@pytest.mark.parametrize(
    "arguments", commands("python -m memorizing_transformers"), ids=lambda args: args[0]
)
def test_other_commands_have_the_options_shown(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "memorizing_transformers", arguments[0], "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in arguments[1:]:
        assert not option.startswith("--") or option in shown
        assert not option.startswith("configs/") or (ROOT / option).exists()


def test_switches_are_shown_without_a_value() -> None:
    """On no page and in no comment: a command refuses it."""
    switches = {
        name
        for command in all_commands().values()
        for name, parameter in signature(command).parameters.items()
        if parameter.default is False
    }
    assert "check" in switches
    shown = re.compile(rf"--({'|'.join(switches)})[ =](true|false)\b", re.IGNORECASE)
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    found = [(file.name, hit[0]) for file in files for hit in shown.finditer(file.read_text())]
    assert not found


def test_tensorboard_is_installed() -> None:
    assert commands("tensorboard")
    assert os.access(Path(sys.executable).parent / "tensorboard", os.X_OK)


def test_the_plans_are_counted_and_all_are_listed() -> None:
    plans = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
    assert len(plans) == 12  # as both pages say in words
    page = (ROOT / "docs" / "ablations.md").read_text("utf-8")
    assert "has twelve plans" in page
    assert "twelve plans for `ablate`" in (ROOT / "README.md").read_text("utf-8")
    assert all(f"| `configs/ablations/{plan.name}` |" in page for plan in plans)
