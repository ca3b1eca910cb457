"""The report as JSON lines: one object a token, for those who continue with other tools.

{"index": 812, "id": 301, "text": "parse", "bits": {"off": 9.1, "2048": 0.6},
 "gain": {"2048": 8.5}, "retrieved": {"2048": [{"layer": 2, "head": 0, "share": 0.64,
 "positions": [95], "tokens": ["parse"], "distances": [716], "weights": [0.81]}]},
 "copied": {"2048": {"weight": 0.4, "position": 96, "token": "parse"}}}

``copied`` is there where the model copies; its position and token, where it looks for repetitions
and there is one, are those that followed the last of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .report import Report
from .trace import Trace

BLOCK = 1024
"""Tokens that are turned into objects at once."""


def _retrieved(trace: Trace, pieces: list[str], block: slice) -> list[list[dict[str, Any]]]:
    """By token of a block, what each head retrieved for it."""
    here = np.arange(block.start, min(block.stop, len(pieces))) - 1
    found: list[list[dict[str, Any]]] = [[] for _ in here]
    for number, layer in enumerate(trace.layers):
        positions = trace.positions[number, :, :, block].transpose(2, 0, 1)
        weights = trace.weights[number, :, :, block].transpose(2, 0, 1).round(4)
        shares = trace.shares[number, :, block].T.round(4)
        for index, of_token in enumerate(found):
            query = int(here[index])
            for head, share in enumerate(shares[index].tolist()):
                places = [p for p in positions[index, head].tolist() if p >= 0]
                if places:
                    of_token.append(
                        {
                            "layer": layer,
                            "head": head,
                            "share": round(share, 4),
                            "positions": places,
                            "tokens": [pieces[p] for p in places],
                            "distances": [query - p for p in places],
                            "weights": [
                                round(w, 4) for w in weights[index, head, : len(places)].tolist()
                            ],
                        }
                    )
    return found


def _copied(trace: Trace, pieces: list[str], token: int) -> dict[str, Any]:
    """What was copied to predict a token."""
    assert trace.copied is not None
    found: dict[str, Any] = {"weight": round(float(trace.copied[token]), 4)}
    if trace.repeated is not None and trace.repeated[token]:
        place = token - int(trace.repeated[token])
        found |= {"position": place, "token": pieces[place]}
    return found


def objects(report: Report) -> Iterator[dict[str, Any]]:
    """One object a token, in reading order; token 0, which nothing predicts, has no bits."""
    pieces, ids = report.pieces, report.tokens.ids
    gains = {trace.name: report.gain(trace) for trace in report.readings}
    bits = {trace.name: trace.bits for trace in report.traces}
    for start in range(0, len(pieces), BLOCK):
        block = slice(start, start + BLOCK)
        retrieved = {t.name: _retrieved(t, pieces, block) for t in report.readings}
        for offset, piece in enumerate(pieces[block]):
            index = start + offset
            copies = {
                t.name: _copied(t, pieces, index) for t in report.readings if t.copied is not None
            }
            yield {
                "index": index,
                "id": int(ids[index]),
                "text": piece,
                "bits": {k: round(float(v[index]), 4) if index else None for k, v in bits.items()},
                "gain": {k: round(float(v[index]), 4) if index else None for k, v in gains.items()},
                "retrieved": {name: of_block[offset] for name, of_block in retrieved.items()},
                **({"copied": copies} if copies and index else {}),
            }


def write_lines(
    report: Report, path: Path, advance: Callable[[int], object] = lambda count: None
) -> None:
    """Write the file, calling ``advance`` after each token."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for line in objects(report):
            stream.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            advance(1)
