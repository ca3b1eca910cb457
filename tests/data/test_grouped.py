"""Records as documents by a column: each whole, in order and in one split."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorizing_transformers.data.settings import SPLITS, SourceSettings
from memorizing_transformers.data.sources import grouped
from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Document, Origin, Source
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.sources.splits import fingerprint_sources, open_sources
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.errors import ConfigError

REPOSITORIES = {
    f"owner/repo{r}": {f"{'abc'[n % 3]}/file{n:02d}.py": f"# {r} {n}\n" for n in range(3 + r)}
    for r in range(8)
}
RECORDS = [
    {"content": text, "repo": repo, "path": path}
    for repo, files in REPOSITORIES.items()
    for path, text in files.items()
]
RULES = {"text_column": "content", "group_column": "repo", "sort_column": "path"}
EXPECTED = [
    Document(repo, "".join(files[path] for path in sorted(files)))
    for repo, files in REPOSITORIES.items()
]


def shards(root: Path, records: list[dict[str, Any]], seed: int = 0) -> Path:
    """The records in any order, in files of both kinds."""
    root.mkdir(exist_ok=True)
    records = random.Random(seed).sample(records, len(records))
    third = len(records) // 3
    lines = [json.dumps(record) + "\n" for record in records]
    (root / "a.jsonl").write_text("".join(lines[:third]))
    pq.write_table(pa.Table.from_pylist(records[third : 2 * third]), root / "b.parquet")
    (root / "c.jsonl").write_text("".join(lines[2 * third :]))
    return root


def opened(path: Path, scratch: Path | None = None, group: str = "file", **rules: Any) -> Source:
    return open_files(
        Origin("data.source", str(path)),
        RecordRules(**{**RULES, **rules}),
        group,  # type: ignore[arg-type]
        scratch,
    )


def read(source: Source) -> list[Document]:
    return list(source.documents(lambda name: True))


@pytest.mark.parametrize("batch", [1, 40, 1 << 22])
@pytest.mark.parametrize("seed", [0, 1])
def test_records_of_a_group_are_one_document_in_order(tmp_path, monkeypatch, batch, seed) -> None:
    monkeypatch.setattr(grouped, "BATCH_CHARACTERS", batch)
    source = opened(shards(tmp_path / "r", RECORDS, seed))
    assert list(source.names()) == [document.name for document in EXPECTED]
    assert read(source) == EXPECTED
    assert read(source) == EXPECTED


def test_without_a_sort_column_records_keep_their_order(tmp_path: Path) -> None:
    root = shards(tmp_path / "r", RECORDS, seed=3)
    inner = open_files(Origin("data.source", str(root)), RecordRules("content"), "file")
    order = [document.text for document in read(inner)]
    for document in read(opened(root, sort_column=None)):
        files = REPOSITORIES[document.name].values()
        assert document.text == "".join(text for text in order if text in files)


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    records = [{"content": f"{n}\n", "repo": 7, "path": n} for n in (10, 9, None, 100, 1)]
    source = opened(shards(tmp_path / "r", records), group_column="repo")
    assert read(source) == [Document("7", "1\n9\n10\n100\nNone\n")]


def test_each_record_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    records = [{"content": text, "repo": "r", "path": n} for n, text in enumerate(["a", "", "b"])]
    assert read(opened(shards(tmp_path / "r", records))) == [Document("r", "a\nb\n")]


def test_only_wanted_groups_are_read_from_the_file(tmp_path: Path) -> None:
    source = opened(shards(tmp_path / "r", RECORDS))
    wanted = [EXPECTED[2], EXPECTED[5]]
    names = [document.name for document in wanted]
    assert list(source.documents(lambda name: name in names)) == wanted


def test_names_alone_write_no_file(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr(grouped.tempfile, "TemporaryFile", refuse)
    assert len(list(opened(shards(tmp_path / "r", RECORDS)).names())) == len(EXPECTED)


def test_no_file_is_left_and_the_cache_folder_is_used(tmp_path: Path, monkeypatch) -> None:
    folders = []
    make = grouped.tempfile.TemporaryFile

    def spy(**options: Any) -> Any:
        folders.append(options["dir"])
        return make(**options)

    monkeypatch.setattr(grouped.tempfile, "TemporaryFile", spy)
    source = opened(shards(tmp_path / "r", RECORDS), scratch=tmp_path / "cache")
    documents = source.documents(lambda name: True)
    next(documents)
    assert folders == [tmp_path / "cache"]
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(list(documents)) == len(EXPECTED) - 1


def test_a_document_is_in_one_split_and_whole(corpus, tmp_path: Path, monkeypatch) -> None:
    root = shards(tmp_path / "r", RECORDS)
    settings = corpus(root, **RULES, validation_fraction=0.3, test_fraction=0.2)
    folders = []
    make = grouped.tempfile.TemporaryFile

    def spy(**options: Any) -> Any:
        folders.append(options["dir"])
        return make(**options)

    monkeypatch.setattr(grouped.tempfile, "TemporaryFile", spy)
    folder = prepare_store(settings, tmp_path / "cache")
    assert folders == [tmp_path / "cache"]
    found = {}
    for split in SPLITS:
        store = TokenStore(folder, split)
        for index, name in enumerate(store.names):
            assert name not in found
            found[name] = bytes(store.document(index).astype("uint8")).decode()
    assert found == {document.name: document.text for document in EXPECTED}


def test_columns_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    root = shards(tmp_path / "r", RECORDS)
    others = [
        {"group_column": None, "sort_column": None},
        {"sort_column": None},
        {"group_column": "path"},
        {"sort_column": "content"},
        {"group": "folder"},
    ]
    prints = []
    for rules in ({}, *others):
        settings = SourceSettings(
            str(root), test_fraction=0, validation_fraction=0, **{**RULES, **rules}
        )
        prints.append(fingerprint_sources(open_sources(settings)))
    assert len(set(prints)) == len(prints)


def test_records_without_a_group_are_left_out_and_counted(tmp_path: Path) -> None:
    odd = [{"content": "x", "repo": repo, "path": "x"} for repo in (None, "", None)]
    source = opened(shards(tmp_path / "r", [*RECORDS, *odd, {"content": "x"}]))
    assert read(source) == EXPECTED
    assert source.report()[-1].endswith(
        "4 records left out, they have no data.group_column ('repo')"
    )


def test_a_column_that_no_record_has_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(opened(shards(tmp_path / "r", RECORDS), group_column="repository"))
    message = str(caught.value)
    assert message.startswith("data.group_column = 'repository': no record of ")
    assert message.endswith("give one of content, repo, path")


def test_columns_of_parquet_that_are_else_not_read_are_told_too(tmp_path: Path) -> None:
    records = [{**record, "licence": "MIT"} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    with pytest.raises(ConfigError, match="give one of content, repo, path, licence"):
        read(opened(tmp_path, group_column="repository"))


def test_a_filter_goes_before_groups(tmp_path: Path) -> None:
    source = opened(shards(tmp_path / "r", RECORDS), where={"repo": "owner/repo3"})
    assert read(source) == [EXPECTED[3]]
    assert any("left out by data.where" in line for line in source.report())


def test_lists_of_files_may_be_grouped_too(tmp_path: Path) -> None:
    records = [
        {"repo": "r", "part": part, "files": [{"n": n, "t": f"{part} {n}\n"} for n in (2, 1)]}
        for part in range(2)
    ]
    root = shards(tmp_path / "r", records)
    source = opened(root, text_column="files[].t", sort_column="files[].n", group_column="repo")
    (document,) = read(source)
    assert sorted(document.text.splitlines()[:2]) == document.text.splitlines()[:2]
    assert sorted(document.text.splitlines()) == ["0 1", "0 2", "1 1", "1 2"]


def test_half_a_pair_is_replaced_everywhere(tmp_path: Path) -> None:
    line = '{"content": "a \\ud83d", "repo": "\\ud83d", "path": "\\ud83d"}\n'
    (tmp_path / "r.jsonl").write_text(line * 2)
    source = opened(tmp_path)
    (document,) = read(source)
    assert document.text == "a \ufffd\na \ufffd\n"
    document.name.encode("utf-8")
    assert "U+FFFD" in source.report()[0]


def test_by_folder_the_first_part_of_a_path_counts(tmp_path: Path) -> None:
    paths = [
        "p1/v2/b.tex",
        "p2/v1/main.tex",
        "p1/v2/a.tex",
        "./p2/v1/x.tex",
        "/p1/z.tex",
        "one.tex",
    ]
    records = [{"content": f"{path}\n", "repo": path, "path": path} for path in paths]
    root = shards(tmp_path / "r", records)
    documents = read(opened(root, group="folder", by_folder=True))
    assert documents == [
        Document("one.tex", "one.tex\n"),
        Document("p1", "/p1/z.tex\np1/v2/a.tex\np1/v2/b.tex\n"),
        Document("p2", "./p2/v1/x.tex\np2/v1/main.tex\n"),
    ]


def test_by_folder_the_setting_reaches_records_and_texts(tmp_path: Path) -> None:
    root = shards(tmp_path / "r", [{**r, "path": f"{r['repo']}/{r['path']}"} for r in RECORDS])
    (root / "more").mkdir()
    for name in "ab":
        (root / "more" / f"{name}.txt").write_text(f"{name}\n")
    settings = SourceSettings(
        str(root), text_column="content", group_column="path", group="folder", test_fraction=0
    )
    (reading,) = open_sources(settings)
    names = list(reading.source.names())
    assert names == ["owner", "more"]
    assert read(reading.source)[1] == Document("more", "a\nb\n")


def test_leaving_out_a_file_forgets_its_groups(tmp_path: Path) -> None:
    root = shards(tmp_path / "r", RECORDS)
    (tmp_path / "r" / "d.jsonl").write_text('{"content": "x", "repo": "new", "path": "x"}\n')
    source = opened(root)
    assert "new" in list(source.names())
    (place,) = opened(root / "d.jsonl").places()
    source.leave_out({place})
    assert read(source) == EXPECTED


def test_memory_does_not_grow_with_the_texts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(grouped, "BATCH_CHARACTERS", 1 << 16)

    def peak(copies: int) -> int:
        file = tmp_path / f"{copies}.jsonl"
        with file.open("w") as stream:
            for n in range(40 * copies):
                record = {"content": f"{n}" * 20_000, "repo": f"repo{n % (8 * copies)}", "path": n}
                stream.write(json.dumps(record) + "\n")
        source = opened(file)
        tracemalloc.start()
        pool = pa.default_memory_pool()
        before = pool.bytes_allocated()
        for document in source.documents(lambda name: True):
            assert len(document.text) > 90_000
        most = tracemalloc.get_traced_memory()[1] + pool.bytes_allocated() - before
        tracemalloc.stop()
        return most

    assert peak(10) < 1.5 * peak(2)
