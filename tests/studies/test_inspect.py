"""The command: what it writes, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from examples import SEGMENT, save_checkpoint, small_model
from hostile import HOSTILE

from memorizing_transformers.__main__ import main
from memorizing_transformers.training.checkpoint.folder import TRAINER_FILE

TEXT = HOSTILE * 2


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", "inspect", *map(str, args)])
    main()


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(TEXT, "utf-8", newline="")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(small_model(), tmp_path / "last.ckpt")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model(xl_cache=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines_of(folder: Path) -> list[dict]:
    content = (folder / "tokens.jsonl").read_text("utf-8")
    return [json.loads(line) for line in content.split("\n")[:-1]]


def test_a_checkpoint_gives_a_page_and_lines(
    checkpoint: Path,
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "deep" / "report"
    call(monkeypatch, "--ckpt_path", checkpoint, "--document", document, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "tokens.jsonl"]
    shown = capsys.readouterr().out
    assert "memory off" in shown
    assert "memory 32 " in shown
    assert f"report: {out / 'index.html'}" in shown
    lines = lines_of(out)
    assert "".join(line["text"] for line in lines) == TEXT
    # The segment length is the run's: nothing is retrieved within its first segment.
    assert [bool(line["retrieved"]["32"]) for line in lines[: SEGMENT + 2]] == [
        *[False] * (SEGMENT + 1),
        True,
    ]


def test_a_saved_model_will_do_and_options_count(
    saved: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--ckpt_path", saved, "--document", document]
    call(monkeypatch, *common, "--out", tmp_path / "one", "--memory_sizes", "100,20")
    lines = lines_of(tmp_path / "one")
    assert lines[30]["retrieved"].keys() == {"20", "100"}
    assert lines[9]["retrieved"]["20"]  # segments as long as the XL cache
    options = ["--segment_length", 40, "--retrieved", 2, "--memory_sizes", "64"]
    options += ["--device", "cuda:0" if torch.cuda.is_available() else "cpu"]
    call(monkeypatch, *common, "--out", tmp_path / "two", *options)
    lines = lines_of(tmp_path / "two")
    assert not lines[40]["retrieved"]["64"]
    assert [len(one["positions"]) for one in lines[41]["retrieved"]["64"]] == [2] * 4


def mistakes(tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """By name the options that replace good ones, and what the line must say."""
    for name, content in (
        ("latin", b"caf\xe9" * 90),
        ("empty", b""),
        ("short", b"x" * (SEGMENT + 1)),
    ):
        (tmp_path / name).write_bytes(content)
    plain = save_checkpoint(small_model(layers=[]), tmp_path / "plain.ckpt")
    off = save_checkpoint(small_model(size=0), tmp_path / "off.ckpt")
    damaged = save_checkpoint(small_model(), tmp_path / "damaged.ckpt")
    (damaged / TRAINER_FILE).write_bytes(b"x")
    broken = small_model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    broken = save_checkpoint(broken, tmp_path / "broken.ckpt")
    narrow = small_model(vocab_size=64)
    narrow.save_pretrained(tmp_path / "narrow")
    small_model().save_pretrained(tmp_path / "unsaid")
    (tmp_path / "file").write_text("")
    small_model().save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    return {
        "no checkpoint": (["--ckpt_path", tmp_path / "none"], "ckpt_path = "),
        "no such folder": (["--ckpt_path", tmp_path], "ckpt_path: "),
        "damaged": (["--ckpt_path", damaged], "trainer.ckpt has 1 bytes"),
        "not a number": (["--ckpt_path", broken], "losses that are not finite"),
        "no memory layer": (["--ckpt_path", plain], "its model has no memory layer"),
        "memory off": (["--ckpt_path", off], "memory_sizes = None: .* switched off"),
        "no segment": (["--ckpt_path", tmp_path / "unsaid"], "segment_length = None"),
        "other vocabulary": (
            ["--ckpt_path", tmp_path / "narrow", "--segment_length", 16],
            "the model knows 64",
        ),
        "no document": (["--document", tmp_path / "none"], "document = .*cannot be read"),
        "a folder": (["--document", tmp_path], "document = .*cannot be read"),
        "not UTF-8": (["--document", tmp_path / "latin"], "document = .*not UTF-8"),
        "empty": (["--document", tmp_path / "empty"], "document = .*is empty"),
        "too short": (["--document", tmp_path / "short"], "document = .*has 17 tokens"),
        "out is a file": (["--out", tmp_path / "file"], "out = .*cannot be written to"),
        "out within a file": (["--out", tmp_path / "file" / "x"], "out = .*cannot be written"),
        "size below top_k": (["--memory_sizes", "3,64"], r"memory_sizes = '3,64'.*top_k \(4\)"),
        "size 0": (["--memory_sizes", "0"], "memory_sizes = .*0 is read anyway"),
        "no size": (["--memory_sizes", "big"], "memory_sizes = 'big'.*2048,8192"),
        "three sizes": (["--memory_sizes", "8,16,32"], "memory_sizes = .*one or two"),
        "more than there is": (["--memory_sizes", 10**13], "memory_sizes = .*fewer"),
        "more than can be counted": (["--memory_sizes", f"8,{10**23}"], "memory_sizes = .*fewer"),
        "another architecture": (["--ckpt_path", tmp_path / "foreign"], "ckpt_path = .*model_type"),
        "a device that computes nothing": (["--device", "meta"], "device = 'meta'"),
        "no folder": (["--out", ""], "out = ''"),
        "segment 0": (["--segment_length", 0], "segment_length = 0"),
        "none retrieved": (["--retrieved", 0], "retrieved = 0"),
        "too many retrieved": (["--retrieved", 5], r"retrieved = 5.*top_k \(4\)"),
        "no such device": (["--device", "abacus"], "device = 'abacus'"),
        "an unknown option": (["--documents", "x"], "did you mean document"),
    }


def test_every_mistake_is_told_in_one_line(
    checkpoint: Path,
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "report"
    good: list[object] = ["--ckpt_path", checkpoint, "--document", document, "--out", out]
    for name, (options, expected) in mistakes(tmp_path).items():
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *good, *options)
        assert stop.value.code == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), name
        assert re.search(expected, line), (name, line)
    assert not (out / "index.html").exists()
