"""The corpora by name: each overlay on small files with the columns of the real ones."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.settings import SPLITS
from memorizing_transformers.training.cli import MemoryCLI

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted((ROOT / "configs" / "corpora").glob("*.yaml"))
BASES = ["quickstart.yaml", "paper/seg512_mem8192_xl512.yaml"]
PAGE = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")


class ParseOnly(MemoryCLI):
    """Takes configs apart and stops there."""

    def instantiate_classes(self) -> None:
        pass


def values(*paths: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["train.py"])
    args = [f"--config={path}" for path in paths]
    found = vars(ParseOnly(args=args, run=False).config.as_flat())
    return {key: value for key, value in found.items() if key != "config"}


def data_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / "corpora" / f"{name}.yaml").read_text())["data"]


def test_all_five_are_there() -> None:
    names = ["arxiv", "c4-4k", "github", "isabelle", "pg19"]
    assert [path.stem for path in OVERLAYS] == names
    for name in names:
        assert f"`{name}.yaml`" in PAGE


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", BASES)
def test_an_overlay_changes_data_alone(overlay: Path, base: str, monkeypatch) -> None:
    given = yaml.safe_load(overlay.read_text())
    assert [*given] == ["data"]
    path = ROOT / "configs" / base
    before = values(path, monkeypatch=monkeypatch)
    after = values(path, overlay, monkeypatch=monkeypatch)
    changed = {key for key in before if before[key] != after[key]}
    assert "data.source" in changed
    assert changed <= {f"data.{key}" for key in given["data"]}
    for key, value in given["data"].items():
        assert after[f"data.{key}"] == value


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_head_says_what_a_user_must_know(overlay: Path) -> None:
    lines = overlay.read_text().splitlines()
    head = [*takewhile(lambda line: line.startswith("#"), lines)]
    for word in ("Licence:", "Size:", "Tokens:", "The paper:"):
        assert any(line.startswith(f"# {word}") for line in head), word
    assert any("not tried: no network here" in line.lower() for line in head)
    (command,) = (line for line in head if "train.py" in line)
    for config in re.findall(r"--config (\S+)", command):
        assert (ROOT / config).is_file(), config
    assert command.endswith(f"--config {overlay.relative_to(ROOT).as_posix()}")


def test_the_page_says_that_nothing_was_downloaded() -> None:
    assert "Not tried: no network here." in PAGE


def as_jsonl_gz(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    file.write_bytes(gzip.compress(lines.encode()))


def as_parquet(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), file)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch) -> Callable[..., dict[str, dict[str, str]]]:
    """Prepares a corpus by name from the files in the current folder: texts by split and name."""
    monkeypatch.chdir(tmp_path)

    def prepare(name: str, **options: Any) -> dict[str, dict[str, str]]:
        data = DocumentDataModule(**{**data_of(name), "batch_rows": 1, **options})
        data.prepare_data()
        data.setup("fit")
        stores = {split: getattr(data, f"{split}_store") for split in SPLITS}
        return {
            split: {
                name: bytes(store.document(index).astype("uint8")).decode()
                for index, name in enumerate(store.names)
            }
            for split, store in stores.items()
        }

    return prepare


def together(texts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The documents of all splits, none of them in two."""
    names = [name for documents in texts.values() for name in documents]
    assert len(set(names)) == len(names)
    return {name: text for documents in texts.values() for name, text in documents.items()}


def test_pg19_has_a_book_per_document_in_its_own_splits(prepared, monkeypatch) -> None:
    def book(n: int) -> dict[str, Any]:
        return {
            "short_book_title": f"Book {n}",
            "publication_date": 1850 + n,
            "url": f"http://www.gutenberg.org/ebooks/{n}",
            "text": f"Chapter {n}\n" * 9,
        }

    splits = {"train": range(4), "validation": range(4, 6), "test": range(6, 9)}

    def load_dataset(path: str, config: object = None, **options: object) -> dict[str, Any]:
        assert path == "emozilla/pg19"
        return {
            split: datasets.Dataset.from_list([*map(book, numbers)]).to_iterable_dataset()
            for split, numbers in splits.items()
        }

    class Builder:
        hash = "abc"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: Builder())
    texts = prepared("pg19")
    for split, numbers in splits.items():
        assert [*texts[split].values()] == [book(n)["text"] for n in numbers]


def test_arxiv_has_a_paper_per_document(prepared) -> None:
    def record(paper: str, path: str, config: str = "arxiv") -> dict[str, Any]:
        file = f"{paper}/v5 arxiv/{path}"
        return {"text": f"% {file}\n", "meta": {"config": config, "file": file}}

    papers = [f"1812.{n:05d}" for n in range(30)] + ["math0211159"]
    files = ["main.tex", "sections/2_proofs.tex", "sections/1_intro.tex"]
    records = [record(paper, file) for file in files for paper in papers]
    others = [{"text": "lemma", "meta": {"config": "formal", "subset_name": "lean"}}]
    root = Path("data/corpora/proof-pile")
    as_jsonl_gz(root / "train" / "proofpile_train_0.jsonl.gz", records[:40] + others)
    as_jsonl_gz(root / "train" / "proofpile_train_1.jsonl.gz", others + records[40:80])
    as_jsonl_gz(root / "dev" / "proofpile_dev.jsonl.gz", records[80:])
    as_jsonl_gz(root / "test" / "proofpile_test.jsonl.gz", others)
    texts = prepared("arxiv")
    assert together(texts) == {
        paper: "".join(f"% {paper}/v5 arxiv/{file}\n" for file in sorted(files)) for paper in papers
    }
    assert all(texts.values())


def test_github_has_a_repository_per_document(prepared) -> None:
    repositories = [f"owner{n}/name" for n in range(20)]
    paths = {"python": ["setup.py", "a/b.py", "a/a.py"], "c": ["a/a.c"]}
    for language, names in paths.items():
        records = [
            {
                "hexsha": f"{n:040d}",
                "size": n,
                "ext": "py",
                "lang": language,
                "max_stars_repo_path": path,
                "max_stars_repo_name": repository,
                "max_stars_repo_licenses": ["MIT"],
                "max_stars_count": None,
                "content": f"# {repository} {path}",
                "avg_line_length": 1.5,
            }
            for n, (path, repository) in enumerate((p, r) for p in names for r in repositories)
        ]
        root = Path("data/corpora/the-stack/data") / language
        as_parquet(root / "data-00000-of-00002.parquet", records[::2])
        as_parquet(root / "data-00001-of-00002.parquet", records[1::2])
    every = sorted(path for names in paths.values() for path in names)
    expected = {r: "".join(f"# {r} {path}\n" for path in every) for r in repositories}
    assert together(prepared("github")) == expected
    with_licence = prepared("github", where={"max_stars_repo_licenses": ["Apache-2.0", "MIT"]})
    assert together(with_licence) == expected


def test_the_stack_v2_has_text_in_a_list_of_files(prepared) -> None:
    (options,) = (
        block["data"]
        for block in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
        if "text_column" in block["data"]
    )
    records = [
        {
            "repo_name": f"owner/name{n}",
            "files": [
                {
                    "blob_id": "x",
                    "path": f"/{path}.py",
                    "language": "Python",
                    "content": f"{n}{path}",
                }
                for path in "cab"
            ],
            "num_files": 3,
        }
        for n in range(12)
    ]
    sink = "".join(json.dumps(record) + "\n" for record in records).encode()
    file = Path("data/corpora/the-stack-v2/part.jsonl.zst")
    file.parent.mkdir(parents=True)
    file.write_bytes(pa.compress(sink, codec="zstd", asbytes=True))
    texts = together(prepared("pg19", **options))
    assert sorted(texts.values()) == sorted(f"{n}a\n{n}b\n{n}c\n" for n in range(12))


def test_c4_has_long_pages_alone(prepared, caplog) -> None:
    def page(n: int, length: int) -> dict[str, Any]:
        text = f"{n:04d}" + "x" * (length - 4)
        return {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://x.org/{n}"}

    root = Path("data/corpora/c4/en")
    lengths = {"train": [4095, 4096, 100, 5000], "validation": [4097, 10], "test": [9000, 4096]}
    pages = {split: [page(n, size) for n, size in enumerate(lengths[split])] for split in SPLITS}
    as_jsonl_gz(root / "c4-train.00000-of-01024.json.gz", pages["train"][:2])
    as_jsonl_gz(root / "c4-train.00001-of-01024.json.gz", pages["train"][2:])
    as_jsonl_gz(root / "c4-validation.00003-of-00008.json.gz", pages["validation"])
    as_jsonl_gz(root / "c4-validation.00004-of-00008.json.gz", pages["test"])
    texts = prepared("c4-4k")
    for split in SPLITS:
        long = [page["text"] for page in pages[split] if len(page["text"]) >= 4096]
        assert [*texts[split].values()] == long
    told = [record.message for record in caplog.records if "min_tokens" in record.message]
    assert told == ["data.min_tokens = 4096: 3 documents of fewer tokens left out, 5 kept"]


def test_isabelle_has_an_entry_per_document_in_import_order(prepared) -> None:
    root = Path("data/corpora/afp")
    for n in range(24):
        entry = root / "thys" / f"Entry{n:02d}"
        (entry / "document").mkdir(parents=True)
        (entry / "document" / "root.tex").write_text("\\documentclass{article}")
        (entry / "ROOT").write_text("session X = HOL +")
        (entry / "A.thy").write_text(f"theory A imports B begin (* {n} *) end")
        (entry / "B.thy").write_text('theory B imports "HOL-Library.Multiset" begin end')
    (root / "etc").mkdir()
    (root / "etc" / "settings").write_text("x")
    texts = together(prepared("isabelle"))
    assert [*sorted(texts)] == [f"Entry{n:02d}" for n in range(24)]
    for n in range(24):
        first, second = texts[f"Entry{n:02d}"].splitlines()
        assert first == 'theory B imports "HOL-Library.Multiset" begin end'
        assert second == f"theory A imports B begin (* {n} *) end"
