"""The JSON lines say what the report holds, one line a token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from examples import identity_model, planted, report_on, small_model
from hostile import HOSTILE

from memorizing_studies.inspection.json_lines import BLOCK, objects, write_lines
from memorizing_studies.inspection.report import Report


def read_lines(report: Report, path: Path) -> list[dict]:
    write_lines(report, path)
    # A line may hold U+2028, which ends no line of JSON.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_every_token_has_its_line(tmp_path: Path) -> None:
    text = HOSTILE * (2 * BLOCK // len(HOSTILE) + 1)
    report = report_on(text, small_model(), (32, 64), segment=128)
    lines = read_lines(report, tmp_path / "lines")
    assert [line["index"] for line in lines] == list(range(len(report.tokens)))
    assert [line["id"] for line in lines] == report.tokens.ids.tolist()
    assert "".join(line["text"] for line in lines) == text
    for name, trace in zip(("off", "32", "64"), report.traces, strict=True):
        assert lines[0]["bits"][name] is None
        assert np.allclose([line["bits"][name] for line in lines[1:]], trace.bits[1:], atol=1e-4)
    gains = [line["gain"]["64"] for line in lines[1:]]
    assert np.allclose(gains, report.gain(report.traces[2])[1:], atol=1e-4)
    assert lines[0]["retrieved"] == {"32": [], "64": []}
    for line in lines[BLOCK - 3 : BLOCK + 3]:
        for trace in report.readings:
            of_token = line["retrieved"][trace.name]
            assert [(one["layer"], one["head"]) for one in of_token] == [(1, h) for h in range(4)]
            for one in of_token:
                assert (
                    one["positions"] == trace.positions[0, one["head"], :, line["index"]].tolist()
                )
                assert one["tokens"] == [report.pieces[p] for p in one["positions"]]
                assert one["distances"] == [line["index"] - 1 - p for p in one["positions"]]
                weights = trace.weights[0, one["head"], :, line["index"]]
                assert np.allclose(one["weights"], weights, atol=1e-4)
                share = trace.shares[0, one["head"], line["index"]]
                assert np.isclose(one["share"], share, atol=1e-4)


def test_planted_names_are_in_the_lines() -> None:
    text, words = planted(1_200, {"alpha": (40, 1_100)})
    report = report_on(text, identity_model(words), (1_100,), segment=64)
    line = list(objects(report))[1_101]
    assert line["text"].strip() == "ALPHA"
    for head in line["retrieved"]["1100"]:
        assert head["positions"][0] == 40
        assert head["tokens"][0].strip() == "alpha"
        assert head["distances"][0] == 1_060


def copying_report() -> tuple[Report, int, int]:
    """A text whose tokens 1,100 to 1,105 are those from 40 on, read by a model that copies."""
    text, words = planted(1_200, {})
    pieces = text.split(" ")
    pieces[1_100:1_106] = pieces[40:46]
    pieces[46], pieces[1_106] = words[0], words[1]
    model = identity_model(words, copy=["neighbours", "repeats"])
    return report_on(" ".join(pieces), model, (1_150,), segment=64), 40, 1_100


def test_copies_name_the_place_that_they_are_from() -> None:
    report, first, again = copying_report()
    lines = list(objects(report))
    assert "copied" not in lines[0]
    trace = report.readings[0]
    assert trace.copied is not None
    for line in lines[1:]:
        copied = line["copied"]["1150"]
        assert 0 <= copied["weight"] <= 1
        assert np.isclose(copied["weight"], trace.copied[line["index"]], atol=1e-4)
    for step in range(3, 6):
        copied = lines[again + step]["copied"]["1150"]
        assert copied["position"] == first + step
        assert copied["token"].strip() == lines[again + step]["text"].strip()
        assert copied["weight"] > 0
    # What cannot be copied has no such figures.
    plain = report_on("plain text " * 30, small_model(), (64,), segment=32)
    assert all("copied" not in line for line in objects(plain))
