"""A file is one document, whatever it is called and however it is reached."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memorizing_transformers.data.settings import SPLITS, SourceSettings
from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Document, Origin, UniqueNames, readable
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.data.sources.splits import open_sources
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore
from memorizing_transformers.errors import ConfigError


def read(value: object, group: str = "file") -> list[Document]:
    source = open_files(Origin("data.source", str(value)), RecordRules(), group)  # type: ignore[arg-type]
    return list(source.documents(lambda name: True))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a folder in it, and another one beside it."""
    for name in ("root/a.txt", "root/sub/b.txt", "root/sub/c.txt", "away/d.txt", "away/in/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path / "root"


INSIDE = ["a.txt", "sub/b.txt", "sub/c.txt"]


def up(root: Path) -> None:
    (root / "sub" / "up").symlink_to("..")


def two_ways_up(root: Path) -> None:
    up(root)
    (root / "sub" / "also").symlink_to("..")
    (root / "round").symlink_to(root)


def out_and_back(root: Path) -> None:
    (root / "sub" / "out").symlink_to(root.parent)
    (root.parent / "away" / "back").symlink_to(root)


def linked_file(root: Path) -> None:
    (root / "0.txt").symlink_to("sub/b.txt")
    (root / "sub" / "z.txt").symlink_to(root / "a.txt")


def linked_folder_inside(root: Path) -> None:
    (root / "0").symlink_to("sub")


def hard_link(root: Path) -> None:
    os.link(root / "sub" / "b.txt", root / "sub" / "z.txt")


def dead_ends(root: Path) -> None:
    (root / "gone.txt").symlink_to("nowhere")
    (root / "self.txt").symlink_to("self.txt")
    os.mkfifo(root / "pipe.txt")


@pytest.mark.parametrize("form", ["", "/**/*.txt", "/**", "/../root/**/*", "/**/**/*.txt"])
@pytest.mark.parametrize(
    "further",
    [up, two_ways_up, out_and_back, linked_file, linked_folder_inside, hard_link, dead_ends],
)
def test_a_second_name_is_no_second_document(
    root: Path, further: Callable[[Path], None], form: str
) -> None:
    expected = read(f"{root}{form}")
    assert [document.name for document in expected] == INSIDE
    further(root)
    assert read(f"{root}{form}") == expected
    assert read(f"{root}{form}", "folder") == [
        Document("a.txt", expected[0].text),
        Document("sub", f"{expected[1].text}\n{expected[2].text}\n"),
    ]


@pytest.mark.parametrize("form", ["", "/**/*.txt", "/**"])
def test_linked_folders_are_entered_alike(root: Path, form: str) -> None:
    (root / "z link").symlink_to("../away")
    (root / "link").symlink_to("../away/in")
    names = [document.name for document in read(f"{root}{form}")]
    assert names == ["a.txt", "link/e.txt", *INSIDE[1:], "z link/d.txt"]
    assert read(f"{root}/*/*.txt") == read(f"{root}{form}")[1:]


def test_a_file_goes_by_the_name_without_links(root: Path) -> None:
    linked_file(root)
    linked_folder_inside(root)
    assert [document.name for document in read(f"{root}/**/*.txt")] == INSIDE
    # Where nothing else matches, the link's name does.
    assert [document.name for document in read(f"{root}/0*/c.txt")] == ["0/c.txt"]
    assert [document.name for document in read(f"{root}/0*")] == ["0.txt"]


def test_hidden_files_are_read_only_if_they_are_asked_for(root: Path) -> None:
    for name in (".hidden.txt", "sub/.deep/x.txt", ".away/y.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to(".away")
    for form in (root, f"{root}/**", f"{root}/sub/../**/*.txt"):
        names = [document.name for document in read(form)]
        assert names == [*INSIDE[:1], "link/y.txt", *INSIDE[1:]]
    assert read(root / ".hidden.txt") == [Document(".hidden.txt", ".hidden.txt")]
    assert read(root / ".away") == [Document("y.txt", ".away/y.txt")]


def test_links_with_kinds_are_read_as_what_they_are_called(root: Path) -> None:
    (root / "blob").write_bytes(gzip.compress(json.dumps({"id": 1, "text": "t"}).encode()))
    (root / "x.jsonl.gz").symlink_to("blob")
    assert read(f"{root}/x*") == read(root / "x.jsonl.gz") == [Document("1", "t")]


def test_a_folder_that_cannot_be_listed_is_named(root: Path, monkeypatch) -> None:
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot list .*sub \(PermissionError"):
        read(root)


def test_a_file_in_a_folder_that_cannot_be_listed_is_read(root: Path, monkeypatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert len(read(root / "a.txt")) == 1


def splits(**settings: object) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for reading in open_sources(SourceSettings(**settings)):  # type: ignore[arg-type]
        for document in reading.source.documents(lambda name: True):
            found.setdefault(reading.split_of(document.name), set()).add(document.text)
    return found


@pytest.mark.parametrize("group", ["file", "folder"])
@pytest.mark.parametrize(
    "held_out", ["sub", "sub/*.txt", "**/b.txt", "sub/../sub/b.txt", "0", "0/b.txt", "z.txt"]
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_file_is_both_learned_and_held_out(
    root: Path, split: str, held_out: str, group: str
) -> None:
    linked_folder_inside(root)
    os.link(root / "sub" / "b.txt", root / "z.txt")
    settings = {"source": str(root), f"{split}_source": str(root / held_out), "group": group}
    settings |= {"validation_fraction": 0, "test_fraction": 0}
    found = splits(**settings)
    assert "text of root/sub/b.txt" in "".join(found[split])
    for name in INSIDE:
        places = [s for s, texts in found.items() if f"text of root/{name}" in "".join(texts)]
        assert len(places) == 1
    (reading,) = (r for r in open_sources(SourceSettings(**settings)) if r.splits == ("train",))
    (line,) = (line for line in reading.source.report() if "left out of training" in line)
    assert f"data.{split}_source reads them too" in line
    alone = SourceSettings(str(root), validation_fraction=0, test_fraction=0, group=group)  # type: ignore[arg-type]
    assert reading.source.fingerprint() != open_sources(alone)[0].source.fingerprint()


def test_records_are_kept_apart_too(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    settings = {"source": str(tmp_path), "validation_source": str(tmp_path / "b.jsonl")}
    assert splits(**settings, test_fraction=0) == {"train": {"a"}, "validation": {"b"}}


def test_nothing_left_to_learn_is_refused(corpus, texts: Path, tmp_path: Path) -> None:
    for source, held_out in ((texts, texts / "*"), ("stdlib", "stdlib")):
        settings = corpus(source, validation_source=str(held_out), test_fraction=0)
        with pytest.raises(ConfigError, match=r"^data\.source = .*: data\.validation_source reads"):
            prepare_store(settings, tmp_path / "cache")


def test_validation_and_test_may_be_the_same(corpus, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    held = str(tmp_path / "held.txt")
    settings = corpus(texts, validation_source=held, test_source=held)
    folder = prepare_store(settings, tmp_path / "cache")
    assert [TokenStore(folder, split).names for split in SPLITS[1:]] == [["held.txt"]] * 2


BAD = [b"caf\xe9.txt", b"caf\xe8.txt", b"\xff\xfe.txt", b"sub\xe9/x.txt"]


def test_names_that_are_not_utf8_are_escaped_once(corpus, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    for name in (*BAD, b"caf\\xe9.txt", "käse.txt".encode(), b"a.txt", b"b.txt"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some words " * 9)
    source = open_files(Origin("data.source", str(root)), RecordRules(), "file")
    names = list(source.names())
    assert names == [document.name for document in source.documents(lambda name: True)]
    assert set(names) == {
        "caf\\xe9.txt", "caf\\xe9.txt (2)", "caf\\xe8.txt", "\\xff\\xfe.txt", "sub\\xe9/x.txt",
        "käse.txt", "a.txt", "b.txt",
    }  # fmt: skip
    folder = prepare_store(corpus(root, validation_fraction=0.3), tmp_path / "cache")
    stored = [name for split in SPLITS for name in TokenStore(folder, split).names]
    assert sorted(stored) == sorted(names)
    grouped = open_files(Origin("data.source", str(root)), RecordRules(), "folder")
    assert "sub\\xe9" in list(grouped.names())


def test_files_that_cannot_be_read_are_told_readably(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt.gz")
    odd.write_bytes(b"no archive")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    str(caught.value).encode("utf-8")
    odd.unlink()
    odd.with_suffix("").write_bytes(b"\xe9 bad")
    source = open_files(Origin("data.source", str(tmp_path)), RecordRules(), "file")
    list(source.documents(lambda name: True))
    (line,) = source.report()
    line.encode("utf-8")


@pytest.mark.parametrize("key", ["source", "validation_source", "test_source"])
def test_a_source_that_is_not_utf8_is_refused_at_once(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\..*= 'caf\\+xe9': is not UTF-8") as caught:
        SourceSettings(**{key: os.fsdecode(b"caf\xe9")})
    str(caught.value).encode("utf-8")


def test_readable_names_are_valid_and_told_apart() -> None:
    assert [readable(name) for name in ("", "a b\n", "Käse 漢")] == ["", "a b\n", "Käse 漢"]
    odd = [os.fsdecode(bytes([byte])) for byte in range(0x80, 0x100)] + ["\ud83d", "x\ud83d\udce9"]
    made = [readable(name) for name in odd]
    assert len(set(made)) == len(odd)
    assert all(name.encode("utf-8") for name in made)


def test_names_are_made_unique() -> None:
    unique = UniqueNames()
    given = ["a", "a", "a (2)", "b", "a", "a (2)", "a", "b (2)", "b"]
    made = [unique.take(name) for name in given]
    assert len(set(made)) == len(given)
    assert made[:2] == ["a", "a (2)"]
    assert all(name.startswith(raw) for name, raw in zip(made, given, strict=True))
    again = UniqueNames()
    assert [again.take(name) for name in given] == made
