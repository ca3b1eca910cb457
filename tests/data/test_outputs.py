"""What this program writes is never read as text, wherever it is and whatever the source is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memorizing_studies.ablation import plan_file
from memorizing_studies.inspection import command as inspect
from memorizing_transformers.data.settings import SPLITS
from memorizing_transformers.data.sources import outputs
from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Origin
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import MANIFEST, TokenStore
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.checkpoint import folder as checkpoints

README = Path(__file__).parents[2] / "data" / "README.md"


def names(value: object, cache_dir: Path | None = None, group: str = "file") -> list[str]:
    source = open_files(Origin("data.source", str(value)), RecordRules(), group, cache_dir)  # type: ignore[arg-type]
    return list(source.names())


def write(folder: Path, *files: str) -> None:
    """Small files of text, so that nothing is left out because it looks binary."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('{"text": "some words"}\n')


def stored(folder: Path) -> list[str]:
    return sorted(name for split in SPLITS for name in TokenStore(folder, split).names)


@pytest.mark.parametrize("form", ["", "**/*", "**/*.*", "**"])
@pytest.mark.parametrize("place", ["cache", "deep/in/cache", ".", "../cache", "linked/cache"])
def test_the_cache_is_not_read(corpus, texts: Path, form: str, place: str, monkeypatch) -> None:
    if place == "linked/cache":
        (texts.parent / "elsewhere").mkdir()
        (texts / "linked").symlink_to(texts.parent / "elsewhere")
    expected = sorted(file.name for file in texts.glob("*.txt"))
    monkeypatch.chdir(texts)
    settings = corpus(form or ".")
    folders = {prepare_store(settings, Path(place)).resolve() for _ in range(3)}
    assert len(folders) == 1
    assert stored(folders.pop()) == expected


def test_stores_of_other_caches_are_not_read_either(corpus, texts: Path) -> None:
    first = prepare_store(corpus(texts, tokenizer="bpe"), texts / "old cache")
    again = prepare_store(corpus(texts, tokenizer="bpe"), texts / "new cache")
    assert first.name == again.name
    assert prepare_store(corpus(texts, tokenizer="bpe"), texts.parent / "third").name == first.name


def test_a_source_inside_the_cache_folder_is_read(corpus, texts: Path) -> None:
    write(texts.parent, "other.txt")
    (texts / "link.txt").symlink_to(texts.parent / "other.txt")
    folder = prepare_store(corpus(texts), texts.parent)
    assert len(stored(folder)) == 13
    assert prepare_store(corpus(texts.parent / "t*" / "*.txt"), texts.parent).is_dir()


TAGGED = "a folder with the tag"
OURS: dict[str, list[str]] = {
    "a run": ["runs/version_0/config.yaml", "runs/version_0/hparams.yaml",
              "runs/version_0/events.out.tfevents.1.host", "runs/version_0/new file.txt",
              "runs/version_0/checkpoints/step=3.ckpt/manifest.json"],
    "a run that begins": ["runs/version_12/hparams.yaml"],
    "a run of CSVLogger": ["runs/lightning_logs/version_1/metrics.csv",
                           "runs/lightning_logs/version_1/hparams.yaml"],
    "a run without version": ["events.out.tfevents.1.host", "hparams.yaml", "config.yaml",
                              "checkpoints/notes.txt"],
    "a checkpoint": ["last.ckpt/manifest.json", "last.ckpt/trainer.ckpt",
                     "last.ckpt/rank-00000.safetensors", "last.ckpt/more/files.txt"],
    "a prediction": ["predict/version_0/predictions.parquet", "predict/version_0/hparams.yaml",
                     "predict/version_0/predictions.rank-1.parquet"],
    "a prediction without a logger": ["runs/predictions.parquet", "runs/documents.parquet",
                                      "runs/documents.rank-1.parquet"],
    "a trial": ["out/small/seed-0/trial.json", "out/small/seed-0/log.txt",
                "out/small/seed-0/version_0/hparams.yaml"],
    "tables": ["out/table.md", "out/table.csv", "out/trials.csv", "out/plot.png",
               "out/tensorboard/small/events.out.tfevents.1"],
    "a memorized model": ["model/memorized.json", "model/memory.safetensors",
                          "model/tokenizer/tokenizer.json"],
    "an export": ["model/config.json", "model/model.safetensors", "model/README.md",
                  "model/tokenizer/tokenizer.json"],
    "a large export": ["model/config.json", "model/model-00001-of-00002.safetensors",
                       "model/model.safetensors.index.json"],
    "tasks": ["out/table.md", "out/table.csv", "out/table.json", "out/items.json",
              "out/scores.json", "out/index.html", "out/tensorboard/events.out.tfevents.1"],
    "a report": ["report/index.html", "report/tokens.jsonl"],
    "an unfinished store": ["old/0123456789abcdef.tmp-x1/train.tokens.bin",
                            "old/0123456789abcdef.tmp-x1/tokenizer/tokenizer.json"],
    "a lock": ["old/0123456789abcdef.lock"],
    "a store": ["s/manifest.json", "s/train.tokens.bin", "s/tokenizer/tokenizer.json"],
    TAGGED: ["tagged/CACHEDIR.TAG", "tagged/deep/text.txt"],
    "drafts": [".tokens.jsonl.partial", "runs/.version_0.lock"],
}  # fmt: skip


@pytest.mark.parametrize("group", ["file", "folder"])
@pytest.mark.parametrize("kind", OURS)
def test_outputs_are_not_read(tmp_path: Path, kind: str, group: str) -> None:
    root = tmp_path / "root"
    write(root, "a.txt", "out/own.txt", "runs/own.txt", "model/own.txt", *OURS[kind])
    expected = ["a.txt", "model/own.txt", "out/own.txt", "runs/own.txt"]
    if group == "folder":
        assert names(root, group=group) == ["a.txt", "model", "out", "runs"]
        return
    for form in (root, root / "**", f"{root}/../root/**/*"):
        assert names(form) == expected
    if OURS[kind][0].count("/") < 3 and kind not in ("drafts", TAGGED):
        with pytest.raises(ConfigError, match="this program wrote it"):
            names(root / OURS[kind][0])
    # A link does not make a text of it.
    target = root / OURS[kind][0].split("/")[0]
    if target.is_dir() and kind != "drafts":
        write(tmp_path / "other", "b.txt")
        (tmp_path / "other" / "link").symlink_to(target)
        assert {"b.txt"} <= set(names(tmp_path / "other")) <= {"b.txt", "link/own.txt"}


def test_texts_that_only_look_alike_are_read(tmp_path: Path) -> None:
    files = [
        "README.md", "checkpoints/text.txt", "config.json", "config.yaml", "index.html",
        "manifest.json", "seed-1/text.txt", "table.md", "tokens.jsonl.txt", "trial.json",
        "version_1/chapter.txt", "version_1/config.yaml", "yarn.lock",
    ]  # fmt: skip
    write(tmp_path, *files)
    assert names(tmp_path) == sorted(files, key=lambda name: name.split("/"))


def test_the_saved_config_of_a_run_that_only_began_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "version_0/config.yaml")
    (tmp_path / "version_0" / "config.yaml").write_text("# lightning.pytorch==2.6.6\ndata: {}\n")
    assert names(tmp_path) == ["a.txt"]


def test_files_linked_into_a_store_are_not_read(corpus, texts: Path, tmp_path: Path) -> None:
    folder = prepare_store(corpus(texts), tmp_path / "cache")
    (texts / "link.json").symlink_to(folder / "train.names.json")
    (texts / "folder").symlink_to(folder / "tokenizer")
    assert len(names(texts)) == 12
    for inside in (folder / "train.names.json", folder, folder / "tokenizer", f"{folder}/*.json"):
        with pytest.raises(ConfigError, match="this program wrote"):
            names(inside)


def test_it_is_told_what_was_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "x/version_0/hparams.yaml", "x/version_1/hparams.yaml")
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    first = tmp_path / "x" / "version_0"
    assert source.report() == [f"{tmp_path}: left out what this program wrote: {first} and 1 more"]


def test_the_page_of_the_data_folder_is_no_document(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b/README.md")
    (tmp_path / "README.md").write_bytes(README.read_bytes())
    assert names(tmp_path) == ["a.txt", "b/README.md"]


def test_a_store_is_whole_with_and_without_its_tag(corpus, texts: Path, tmp_path: Path) -> None:
    folder = prepare_store(corpus(texts), tmp_path / "cache")
    tag = folder / "CACHEDIR.TAG"
    assert tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    inode = os.stat(folder / MANIFEST).st_ino
    tag.unlink()
    assert prepare_store(corpus(texts), tmp_path / "cache") == folder
    assert os.stat(folder / MANIFEST).st_ino == inode
    assert len(names(texts.parent / "t*" / "*")) == 12


def test_the_names_are_those_that_are_written() -> None:
    assert (checkpoints.MANIFEST, checkpoints.TRAINER_FILE) in outputs.COMPLETE_FOLDERS
    assert {*outputs.TABLES} == {*plan_file.TAKEN}
    assert (inspect.PAGE, inspect.LINES) in [rule.evidence for rule in outputs.RULES]
