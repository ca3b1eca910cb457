"""Small JSON files through which processes exchange results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memorizing_transformers.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write a file under a temporary name and rename it, so that readers never see half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> Any:
    """The content of a file, or None if it does not exist.

    Raises:
        UserError: if it does not hold a JSON object.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged; delete the folder {path.parent}")
    return found
