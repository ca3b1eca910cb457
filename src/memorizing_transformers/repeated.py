"""Refuse a key that a YAML or JSON file gives twice: the parser would silently take the last."""

from __future__ import annotations

import yaml

MERGE = "tag:yaml.org,2002:merge"


class RepeatedKey(yaml.YAMLError):
    """A key that is given more than once."""


def refuse_repeated_keys(text: str) -> None:
    """Check a YAML or JSON document.

    ``data.seed: 1`` and ``data: {seed: 2}`` give the same key. A key that overrides one merged with
    ``<<`` is not a repetition.

    Raises:
        RepeatedKey: naming the key and its lines.
        yaml.YAMLError: if the text is not YAML.
    """
    given: dict[str, int] = {}
    """By full key, the line of its value."""
    seen: set[int] = set()
    waiting = [("", yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))]
    while waiting:
        prefix, node = waiting.pop(0)
        if id(node) in seen:  # an anchor
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{prefix}{number}.", item) for number, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        here: dict[str, int] = {}
        """The same for the keys of this mapping, also where the value is a mapping."""
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            waiting.append((f"{name}.", value))
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            known = here if isinstance(value, yaml.MappingNode) else {**given, **here}
            if name in known:
                lines = f"line {line}"
                if known[name] != line:
                    lines = f"lines {min(known[name], line)} and {max(known[name], line)}"
                raise RepeatedKey(f"{name} is given twice, in {lines}; keep one")
            here[name] = line
            if not isinstance(value, yaml.MappingNode):
                given[name] = line
