"""The command tasks: from a model and documents to tables, plots and a page; one line a mistake."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from examples import small_model
from task_texts import code, isabelle, latex
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from memorizing_studies.tasks.suite import TASKS
from memorizing_transformers.__main__ import main
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer

SMALL = ["--questions", 8, "--min_distance", 48, "--max_tokens", 1024, "--candidates", 5,
         "--segment_length", 64, "--max_documents", 4]  # fmt: skip
NASTY = "<script>alert(1)<|"


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", "tasks", *map(str, args)])
    main()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    small_model(xl_cache=16, size=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "control"
    small_model(xl_cache=16, layers=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents to be used, and five that cannot be."""
    path = tmp_path_factory.mktemp("data") / f"{NASTY}.jsonl.gz"
    good = {"sets": latex(0, 4), "code": code(0), "proofs": isabelle(0)}
    bad = ["", " \n ", "short", "binary \0" * 90, "x" * 200_000]
    records = [{"title": name, "text": text} for name, text in good.items()]
    records = [{"title": f"bad {n}", "text": text} for n, text in enumerate(bad)] + records
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def test_a_run_gives_tables_plots_and_a_page(
    model: Path,
    control: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "deep" / "tasks"
    call(monkeypatch, "--model", model, "--control", control, "--data", data, "--out", out, *SMALL)
    said = capsys.readouterr().out
    assert f"results: {out / 'index.html'}" in said
    for line in ("2 skipped (empty)", "1 skipped (binary)", "1 skipped (too short)",
                 "1 skipped (a line of more than 100,000 characters)"):  # fmt: skip
        assert f"documents: {line}" in said
    files = {path.name for path in out.iterdir()}
    tables = {"table.md", "table.csv", "table.json", "index.html", "items.json", "scores.json"}
    assert "key-tokens: 1 skipped (no reference model was given)" in said
    names = TASKS.keys() - {"key-tokens"}
    assert files == tables | {f"{name}.png" for name in names} | {"tensorboard"}
    rows = rows_of(out)
    assert {row["task"] for row in rows} == names
    arms = {"memory on", "memory off", "control", "memory on - memory off", "memory on - control"}
    for name in names - {"many-documents"}:
        own = [row for row in rows if row["task"] == name and row["measure"] == "accuracy"]
        assert {row["arm"] for row in own} >= arms | {"chance"}
        assert all(0 <= float(row["value"]) <= 1 for row in own if " - " not in row["arm"])
    whole = json.loads((out / "table.json").read_text())
    assert len(whole["rows"]) == len(rows)
    assert whole["facts"]["seed"] == 0
    assert whole["skipped"]["documents"]["empty"] == 2
    written = (out / "table.md").read_text()
    assert all(TASKS[name].title in written for name in names)
    assert "memory on - control" in written
    page = (out / "index.html").read_text("utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {tag.split("/")[0] for tag in tags["scalars"]} == names
    assert {*tags["images"]} == names


def test_a_pretrained_model_is_given_a_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    call(monkeypatch, "--model", tmp_path / "base", "--data", data, "--out", tmp_path / "out",
         "--tasks", "label-recall", "--memory_size", 2048, *SMALL)  # fmt: skip
    arms = {row["arm"] for row in rows_of(tmp_path / "out")}
    assert {"memory on", "memory off", "memory on - memory off"} <= arms


def test_two_models_see_the_same_items(
    model: Path, control: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ["--tasks", "label-recall"]
    for name, one in (("first", model), ("second", control)):
        out = tmp_path / name
        call(monkeypatch, "--model", one, "--data", data, "--out", out, *some, *SMALL)
    first, second = ((tmp_path / n / "items.json").read_text() for n in ("first", "second"))
    assert first == second
    again, items = tmp_path / "again", tmp_path / "first" / "items.json"
    # Sizes and the seed come from the file.
    call(monkeypatch, "--model", model, "--data", data, "--items", items, "--out", again,
         "--segment_length", 64, "--seed", 5)  # fmt: skip
    assert (again / "items.json").read_text() == first
    assert (again / "scores.json").read_text() == (tmp_path / "first" / "scores.json").read_text()
    without = {row["arm"] for row in rows_of(tmp_path / "second")}
    assert without == {"no memory", "chance", "most recent", "most frequent"}


def test_every_mistake_is_told_in_one_line(
    model: Path,
    control: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "binary").write_bytes(b"\0" * 4096)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "plain.txt").write_text("a b c d\n" * 90)
    (tmp_path / "file").write_text("")
    (tmp_path / "items.json").write_text("{}")
    (tmp_path / "no-text.jsonl").write_text('{"body": "x"}\n')
    good = ["--model", model, "--data", data, "--out", tmp_path / "out"]
    for args, named in (
        (good[:2], "data = None"),
        (["--model", tmp_path / "nowhere", *good[2:]], "model = "),
        ([*good, "--control", tmp_path / "nowhere"], "control = "),
        ([*good[:2], "--data", tmp_path / "nowhere"], "data = "),
        ([*good[:2], "--data", tmp_path / "binary"], "data = "),
        ([*good[:2], "--data", tmp_path / "short.txt"], "1 too short"),
        ([*good[:2], "--data", tmp_path / "no-text.jsonl"], "set text_column to one of body"),
        ([*good, "--tasks", "labels"], "tasks = 'labels': must be among far-copies"),
        ([*good, "--items", tmp_path / "items.json"], "items = "),
        ([*good, "--questions", 0], "questions = 0"),
        ([*good, "--candidates", 1], "candidates = 1"),
        ([*good, "--min_distance", 0], "min_distance = 0"),
        ([*good, "--max_tokens", 100], "max_tokens = 100"),
        ([*good, "--max_documents", 0], "max_documents = 0"),
        ([*good, "--segment_length", 0], "segment_length = 0"),
        ([*good, "--memory_size", -1], "memory_size = -1"),
        ([*good, "--device", "moon"], "device = "),
        ([*good[:-1], tmp_path / "file", *SMALL], "out = "),
        ([*good[:-1], "", *SMALL], "out = ''"),
        ([*good, "--tasks", "lemma-recall", "--max_documents", 1, *SMALL[:6]], "no task finds"),
        ([*good, "--background", tmp_path / "nowhere", *SMALL], "background = "),
        ([*good, "--reference", tmp_path / "nowhere", *SMALL], "reference = "),
        ([*good, "--reference", control, *SMALL], "has no memory"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *args)
        assert stop.value.code == 2, args
        said = capsys.readouterr().err.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1, args
        assert named in errors[0], args
        assert said[-1] == errors[0]
    assert not (tmp_path / "out").exists()


def test_saved_items_are_of_the_same_documents(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    first = ["--model", model, "--out", tmp_path, "--tasks", "label-recall", *SMALL]
    call(monkeypatch, *first, "--data", data)
    other = tmp_path / "other.txt"
    other.write_text(latex(3))
    for args, named in (
        (["--data", other], "asks about document"),
        (["--data", data, "--tasks", "key-values"], "tasks = 'key-values'"),
    ):
        with pytest.raises(SystemExit):
            call(
                monkeypatch,
                "--model",
                model,
                "--items",
                tmp_path / "items.json",
                "--out",
                tmp_path / "again",
                *args,
            )
        assert named in capsys.readouterr().err


def test_texts_of_the_training_make_boilerplate_known(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.txt").write_text(latex(7) + code(0))
    common = ["--model", model, "--data", data, "--tasks", "far-copies", *SMALL]
    call(monkeypatch, *common, "--out", tmp_path / "plain")
    call(monkeypatch, *common, "--out", tmp_path / "known", "--background", tmp_path / "train.txt")

    def boilerplate(name: str) -> int:
        return sum(
            int(row["items"])
            for row in rows_of(tmp_path / name)
            if row["group"].startswith("found elsewhere") and row["arm"] == "chance"
        )

    assert boilerplate("known") > boilerplate("plain")
