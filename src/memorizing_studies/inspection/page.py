"""The report as one HTML page that needs no network and no other file.

The page holds its own script and style, the data as base64 and the plots as SVG. Its policy lets
only that script run and nothing be fetched, whatever a document or a file's name holds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from . import packing
from . import plots as figures
from .report import Report

PAGE_BYTES = 19_500_000
"""What a page may weigh."""
SCRIPTS = ("data.js", "shown.js", "document.js", "overview.js", "panel.js", "table.js", "main.js")
"""Joined in this order into one script."""

HEAD_FIGURES = ("share", "spread", "onTarget", "beforeTarget")


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _script() -> str:
    return '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS) + "})();\n"


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def facts(report: Report) -> dict[str, Any]:
    """What the page says in addition to the arrays."""
    settings = report.settings
    largest = report.readings[-1]
    use = largest.use
    means = [
        use.mean(x).tolist() for x in (use.share, use.spread, use.on_target, use.before_target)
    ]
    heads = [
        {"layer": layer, "head": head, **dict(zip(HEAD_FIGURES, figures_of_head, strict=True))}
        for number, layer in enumerate(largest.layers)
        for head, figures_of_head in enumerate(zip(*(mean[number] for mean in means), strict=True))
    ]
    return {
        "document": report.document,
        "checkpoint": report.checkpoint,
        "step": report.step,
        "segment": report.segment,
        "layers": settings["num_layers"],
        "memoryLayers": list(largest.layers),
        "heads": settings["num_heads"],
        "topK": settings["memory"]["top_k"],
        "combine": settings["memory"]["combine"],
        "xlCache": settings["xl_cache"],
        "names": {str(token): name for token, name in report.names.items()},
        "length": len(report.tokens),
        "readings": report.summary(),
        "copies": largest.copied is not None,
        "repeats": largest.repeated is not None,
        "headUse": heads,
        "chance": report.chance(),
        "bitsStep": packing.BITS_STEP,
        "shareStep": packing.SHARE_STEP,
    }


def render(report: Report, limit: int = PAGE_BYTES) -> str:
    """The page.

    Args:
        report: what it tells.
        limit: bytes that it may take; retrievals of least weight stay away beyond.
    """
    drawn = figures.draw(report)
    script, style, template = _script(), _asset("report.css"), _asset("report.html")
    blobs = packing.text_blobs(report)
    rest = sum(map(len, (script, style, template, *drawn.values()))) + packing.size_of(blobs)
    retrievals, top, kept = packing.all_retrievals(report, limit - rest - 2**16)
    blobs |= retrievals
    blobs["facts"] = packing.facts_blob({**facts(report), "top": top, "kept": kept})
    data = "\n".join(
        f'<script type="application/octet-stream" id="data-{name}">{content}</script>'
        for name, content in blobs.items()
    )
    parts = {"policy": _policy(script), "style": style, "script": script, "data": data, **drawn}
    # In one pass, so that nothing that was put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
