"""The private names of libraries that the package uses: an upgrade that drops one fails by name."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, launchers
from lm_eval.api.model import TemplateLM
from torchmetrics import Metric
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

SOURCE = Path(__file__).parents[1] / "src"
PACKAGES = tuple(folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").is_file())


def _checkpointed() -> Any:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    model.activation_checkpointing_enable()
    return model


USED: dict[str, Callable[[], Any]] = {
    "_actions": ArgumentParser,
    "_attn_implementation": PreTrainedConfig,
    "_apply": lambda: Metric,
    "_broadcast_sigterm_tensor": lambda: (
        Trainer(logger=False, enable_checkpointing=False).fit_loop.epoch_loop
    ),
    "_can_set_attn_implementation": lambda: PreTrainedModel,
    "_can_stop_early": lambda: Trainer(logger=False, enable_checkpointing=False).fit_loop,
    "_checkpoint_connector": lambda: Trainer(logger=False, enable_checkpointing=False),
    "_data_parallel_size": ModelParallelStrategy,
    "_encode_pair": lambda: TemplateLM,
    "_from_pretrained": lambda: PyTorchModelHubMixin,
    "_gradient_checkpointing_func": lambda: _checkpointed().model.layers[0],
    "_hub_mixin_config": lambda: PyTorchModelHubMixin,
    "_loglikelihood_tokens": lambda: TemplateLM,
    "_int_mm": lambda: torch,
    "_last_checkpoint_saved": ModelCheckpoint,
    "_last_global_step_saved": ModelCheckpoint,
    "_run_subcommand": lambda: LightningCLI,
    "_supports_default_dynamic_cache": lambda: GenerationMixin,
    "_parse_ckpt_path": lambda: LightningCLI,
    "_save_pretrained": lambda: PyTorchModelHubMixin,
    "lightning.pytorch.strategies.launchers._MultiProcessingLauncher": lambda: launchers,
    "_should_accumulate": lambda: Trainer(logger=False, enable_checkpointing=False).fit_loop,
    "_version": lambda: TensorBoardLogger("."),
}
"""By name, what has it in the installed library."""
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}
"""Public names of the standard library that begin with an underscore."""
BY_STRING = {"delattr", "getattr", "hasattr", "setattr"}


def is_private(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("_") and part.strip("_") and part[:2] != "__" for part in parts)


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The private attributes that code reads or sets: what it has them of, and their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield ast.unparse(node.value), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_STRING:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield ast.unparse(owner), str(name.value)


def imports(tree: ast.AST) -> Iterator[str]:
    """The private names that code imports from libraries."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (n for n in names if is_private(n) and not n.startswith(PACKAGES))


@cache
def source_of(kind: type) -> str:
    """The text of a library's class; nothing where it is written in C."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def inherited(module: str, node: ast.ClassDef) -> set[str]:
    """The private names of a class of ours that a library's class above it has too."""
    names = {name for owner, name in attributes(node) if owner in ("self", "cls", "super()")}
    names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    names = {name for name in names if is_private(name)}
    if not names or not node.bases:
        return set()
    kind = getattr(importlib.import_module(module), node.name)
    theirs = [k for k in kind.__mro__ if not k.__module__.startswith(PACKAGES)]
    return {
        name
        for name in names
        for base in theirs
        if name in vars(base) or f"self.{name}" in source_of(base)
    }


def names_of(path: Path, text: str) -> set[str]:
    """The private names of libraries in a file."""
    tree = ast.parse(text)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name | ast.arg) and _stored(n)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if ast.unparse(node.value) == "self"
    }
    found = {
        name
        for owner, name in attributes(tree)
        if owner not in ("self", "cls", "super()") and name not in own
    }
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= inherited(module, node)
    return (found | set(imports(tree))) - DOCUMENTED


def _stored(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


@pytest.mark.parametrize("name", USED)
def test_the_library_still_has_the_name(name: str) -> None:
    owner = USED[name]()
    kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
    name = name.rpartition(".")[2]
    there = hasattr(owner, name) or name in getattr(owner, "__annotations__", {})
    assert there, f"{kind.__module__}.{kind.__qualname__} has no {name} any more"


def test_the_list_is_complete_and_no_longer_than_needed() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for name in names_of(path, path.read_text("utf-8")):
            found.setdefault(name, []).append(str(path.relative_to(SOURCE)))
    new = {name: files for name, files in found.items() if name not in USED}
    assert not new, f"private names of libraries; find a public one, or add it to USED: {new}"
    assert not USED.keys() - found.keys(), "nothing uses these any more"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from torch import _int_mm",
        "def f(trainer): return trainer._run",
        "def f(trainer): trainer.strategy._launcher = None",
        "def f(trainer): return getattr(trainer, '_run')",
    ],
)
def test_every_way_to_reach_a_private_name_is_found(line: str) -> None:
    assert names_of(SOURCE / PACKAGES[0] / "__init__.py", line)


def test_the_processes_that_lightning_starts_can_be_watched() -> None:
    """A public name of a private class, which Liveness does without if it is not there."""
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    assert getattr(trainer.strategy.launcher, "procs", None) == []
