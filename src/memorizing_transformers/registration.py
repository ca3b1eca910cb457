"""Tells the Auto classes of transformers of our models, without importing transformers for it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.modeling_auto"
OURS = f"{__package__}.generation.causal_lm"


class _WhenImported(MetaPathFinder):
    """Imports our module, which registers itself, right after that of the Auto classes."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                import_module(OURS)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Let ``AutoModelForCausalLM`` open our folders, now or as soon as it is imported."""
    if AUTO in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, _WhenImported())
