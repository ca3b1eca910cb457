"""Items of an earlier run: asked of models with other tokenizers, and kept as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from examples import small_model
from task_texts import bpe, isabelle, latex
from transformers import ByT5Tokenizer

from memorizing_studies.tasks.arms import cautions
from memorizing_studies.tasks.items import Item, ItemSet, Piece, Sheet, load, save
from memorizing_studies.tasks.scoring import Arm
from memorizing_transformers.__main__ import main
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer, fingerprint_tokenizer
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.checkpoint.opening import open_for_use

SMALL = ["--questions", 8, "--min_distance", 400, "--max_tokens", 1600]


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    options = ["--segment_length", "64", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", "tasks", *map(str, args), *options])
    main()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model for each of three tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers: dict[str, Any] = {"bytes": byte_tokenizer(), "bpe": bpe(), "byt5": ByT5Tokenizer()}
    for name, tokenizer in tokenizers.items():
        model = small_model(xl_cache=16, size=1024, vocab_size=len(tokenizer))
        model.tokenizer = tokenizer
        model.save_pretrained(folder / name)
    return {name: folder / name for name in tokenizers}


@pytest.fixture
def first(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Options of a run of bytes on short texts, most of which is behind the first documents."""
    texts = {n: latex(n, 3)[:900] for n in range(20)} | {20: latex(20, 4), 21: isabelle(0)}
    lines = [json.dumps({"title": str(n), "text": text}) + "\n" for n, text in texts.items()]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    call(monkeypatch, "--model", models["bytes"], "--data", tmp_path / "data.jsonl",
         "--out", tmp_path / "out", "--max_documents", 40, *SMALL,
         "--tasks", "label-recall", "key-values")  # fmt: skip
    return ["--data", tmp_path / "data.jsonl", "--items", tmp_path / "out" / "items.json"]


def test_a_model_with_another_tokenizer_is_asked_the_same(
    models: dict[str, Path], first: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents are too short in its tokens, and more than --max_documents."""
    call(monkeypatch, "--model", models["bpe"], *first, "--out", tmp_path / "again")
    before, after = ((tmp_path / n / "items.json").read_bytes() for n in ("out", "again"))
    assert before == after
    counts = [
        {name: len(of["memory on"]) for name, of in json.loads(path.read_text()).items()}
        for path in (tmp_path / "out" / "scores.json", tmp_path / "again" / "scores.json")
    ]
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 0


def test_asking_some_of_the_items_keeps_the_file(
    models: dict[str, Path], first: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "items.json"
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "--model", models["bytes"], *first, "--tasks", "label-recall",
         "--out", "again/../out")  # fmt: skip
    assert path.read_bytes() == before
    assert json.loads((tmp_path / "out" / "scores.json").read_text()).keys() == {"label-recall"}
    call(monkeypatch, "--model", models["bytes"], *first, "--tasks", "label-recall",
         "--out", "other")  # fmt: skip
    tasks = json.loads((tmp_path / "other" / "items.json").read_text())["tasks"]
    assert tasks.keys() == {"label-recall"}


def test_a_folder_holds_the_last_run_and_what_is_not_of_tasks(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs of other programs, and a picture, lie where results go."""
    (tmp_path / "data.txt").write_text(latex(0, 4))
    out = tmp_path / "out"
    (out / "tensorboard" / "trial").mkdir(parents=True)
    logs = {out / "tensorboard" / "events.out.tfevents.1.host.2.3",
            out / "tensorboard" / "trial" / "events.out.tfevents.4"}  # fmt: skip
    others = logs | {out / "far-copies.png"}
    for file in others:
        file.write_text("")
    common = ["--model", models["bytes"], "--data", tmp_path / "data.txt", "--out", out, *SMALL]

    def files() -> set[Path]:
        return {path for path in out.rglob("*") if path.suffix == ".png" or "tfevents" in path.name}

    call(monkeypatch, *common, "--tasks", "label-recall")
    (event,) = files() - others - {out / "label-recall.png"}
    call(monkeypatch, *common, "--tasks", "variables")
    (other,) = files() - others - {out / "variables.png"}
    assert event != other
    assert files() >= logs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": []}, "AttributeError"),
        ({"settings": {"max_tokens": "many"}}, "max_tokens is 'many', not a whole number"),
        ({"settings": {"seed": None}}, "seed is None"),
        ({"skipped": 3}, "AttributeError"),
        ({"skipped": {"documents": {"empty": "2"}}}, "skipped: a count"),
        ({"digests": []}, "AttributeError"),
        ({"digests": {}}, "document 'a' has none"),
        ({"tasks": {"x": [{"pieces": [], "items": [{}]}]}}, "TypeError"),
        ({"tasks": {"x": 3}}, "TypeError"),
    ],
)
def test_items_that_a_hand_changed_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "items.json"
    item = Item(place=1, x=0, distance=0, chance=0.5, candidates=("a", "b"), answer=1)
    sheet = Sheet((Piece("a", 0, 3),), (item,))
    items = ItemSet({"x": [sheet]}, {"documents": {"empty": 2}}, {"seed": 0}, {"a": "12"})
    save(items, path)
    assert load(path) == items
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ConfigError, match=r"items = .*is no items\.json of") as error:
        load(path)
    assert words in str(error.value)
    whole["tasks"]["x"][0]["items"][0]["answer"] = 2
    path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="no candidate 2"):
        load(path)


def test_cautions_say_what_figures_do_not_show(models: dict[str, Path]) -> None:
    def arm(name: str, segment: int = 64) -> Arm:
        return Arm(name, open_for_use(str(models[name]), None, None)[0], segment)

    def items(*some: Item, **settings: Any) -> ItemSet:
        return ItemSet({"task": [Sheet((), some)]}, {}, settings, {})

    part = Item(place=1, end=2, x=0, distance=0, chance=0.0)
    choice = Item(place=1, x=0, distance=0, chance=0.5, candidates=("a", "b"))
    both, one = [arm("bytes"), arm("bpe", 99)], [arm("bytes")]
    own = {"tokenizer": fingerprint_tokenizer(byte_tokenizer())}
    (near,) = cautions(both, items(choice), 64 + 50)
    assert near.startswith("bpe sees up to 115 tokens back without a memory")
    for arms, asked, expected in (
        (both, items(part), 1),
        (both, items(choice), 0),
        (one, items(part, choice), 0),
        (one, items(part, choice, **own), 0),
        (one, items(part, choice, tokenizer="another"), 1),
    ):
        found = cautions(arms, asked, 115)
        assert len(found) == expected
        assert all("tokenizers" in line for line in found)


@pytest.mark.parametrize("key", ["--model", "--control"])
def test_a_tokenizer_that_knows_no_places_is_refused(
    key: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data, items = tmp_path / "data.txt", tmp_path / "out" / "items.json"
    data.write_text("Größe " + latex(0, 4), "utf-8")
    call(monkeypatch, "--model", models["bytes"], "--data", data, "--out", tmp_path / "out",
         "--tasks", "label-recall", *SMALL)  # fmt: skip
    with pytest.raises(SystemExit):
        call(monkeypatch, "--model", models["bytes"], key, models["byt5"], "--data", data,
             "--items", items, "--out", tmp_path / "again")  # fmt: skip
    name = "control" if key == "--control" else "memory on"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {name}: the tokenizer cannot tell where its tokens lie")
    assert not (tmp_path / "again").exists()
