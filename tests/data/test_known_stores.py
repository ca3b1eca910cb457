"""An unchanged corpus is not read again, and every change of it is noticed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memorizing_transformers.data.sources import text_files
from memorizing_transformers.data.sources.splits import source_files
from memorizing_transformers.data.tokens import known_stores, prepare
from memorizing_transformers.data.tokens.known_stores import KnownStore
from memorizing_transformers.data.tokens.prepare import prepare_store
from memorizing_transformers.data.tokens.store import TokenStore

Change = Callable[[Path], object]
FILE = "text03.txt"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a minute pass."""
    now = time.time_ns
    clock = SimpleNamespace(time_ns=lambda: now() + 60 * 10**9)
    monkeypatch.setattr(known_stores, "time", clock)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just made have not been changed for a minute."""
    wait(monkeypatch)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose content was hashed."""
    names: list[str] = []
    hash_file = text_files.hash_file

    def spying(file: Path | str, *rest: Any) -> bytes:
        names.append(os.path.basename(file))
        return hash_file(file, *rest)

    monkeypatch.setattr(text_files, "hash_file", spying)
    monkeypatch.setattr(known_stores, "hash_file", spying)
    return names


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the corpus is read")

    monkeypatch.setattr(prepare, "open_sources", read)


def test_an_unchanged_corpus_is_not_read(corpus, texts, cache, later, monkeypatch, hashed) -> None:
    folder = prepare_store(corpus(texts), cache)
    assert len(hashed) == 12
    refuse_to_read(monkeypatch)
    assert prepare_store(corpus(texts), cache) == folder
    assert len(hashed) == 12


def in_place(file: Path, text: str) -> None:
    with open(file, "r+") as stream:
        stream.write(text)


def with_old_time(file: Path) -> None:
    times = file.stat()
    in_place(file, "another")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def by_another(file: Path) -> None:
    """A file of the same size and time takes its place."""
    other = file.with_name("other")
    other.write_text(file.read_text().replace("word", "wort"))
    shutil.copystat(file, other)
    other.replace(file)


CHANGES: dict[str, Change] = {
    "longer": lambda texts: (texts / FILE).write_text("one text more " * 20),
    "as long": lambda texts: in_place(texts / FILE, "another"),
    "with the old time": lambda texts: with_old_time(texts / FILE),
    "replaced": lambda texts: by_another(texts / FILE),
    "added": lambda texts: (texts / "more.txt").write_text("one text more " * 20),
    "removed": lambda texts: (texts / FILE).unlink(),
    "renamed": lambda texts: (texts / FILE).rename(texts / "text03b.txt"),
    "exchanged": lambda texts: [
        os.rename(texts / one, texts / other)
        for one, other in (("text01.txt", "x"), (FILE, "text01.txt"), ("x", FILE))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(corpus, texts, cache, tmp_path, later, change: str) -> None:
    folder = prepare_store(corpus(texts), cache)
    CHANGES[change](texts)
    changed = prepare_store(corpus(texts), cache)
    assert changed != folder
    assert changed.name == prepare_store(corpus(texts), tmp_path / "another cache").name


@pytest.mark.parametrize("kind", ["validation_source", "test_source"])
def test_a_change_of_held_out_text_is_noticed(corpus, texts, cache, tmp_path, later, kind) -> None:
    held_out = tmp_path / "held out.txt"
    held_out.write_text("some text")
    settings = corpus(texts, **{kind: str(held_out)})
    folder = prepare_store(settings, cache)
    held_out.write_text("same size")
    assert prepare_store(settings, cache) != folder


def coarse_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose clock stands still."""
    stat, moment = os.stat, time.time_ns()
    times = {"st_mtime_ns": moment, "st_ctime_ns": moment}

    def coarse(file: Any) -> Any:
        facts = stat(file)
        return SimpleNamespace(st_size=facts.st_size, st_ino=facts.st_ino, **times)

    monkeypatch.setattr(known_stores, "os", SimpleNamespace(**{**vars(os), "stat": coarse}))


def test_a_change_in_the_same_moment_is_noticed(corpus, texts, cache, monkeypatch) -> None:
    """Size, times and inode are the same."""
    coarse_clock(monkeypatch)
    folder = prepare_store(corpus(texts), cache)
    with monkeypatch.context() as patch:
        refuse_to_read(patch)
        assert prepare_store(corpus(texts), cache) == folder
    in_place(texts / FILE, "another")
    changed = prepare_store(corpus(texts), cache)
    assert changed != folder
    with monkeypatch.context() as patch:
        refuse_to_read(patch)
        assert prepare_store(corpus(texts), cache) == changed


def test_a_young_file_is_hashed_until_it_is_old(corpus, texts, cache, hashed, monkeypatch) -> None:
    folder = prepare_store(corpus(texts), cache)
    refuse_to_read(monkeypatch)
    hashed.clear()
    assert prepare_store(corpus(texts), cache) == folder
    assert len(hashed) == 12
    wait(monkeypatch)
    assert prepare_store(corpus(texts), cache) == folder
    assert len(hashed) == 24  # they are old now, but the note is not
    assert prepare_store(corpus(texts), cache) == folder
    assert len(hashed) == 24


def test_a_change_while_it_is_read_is_noticed(corpus, texts, cache, monkeypatch) -> None:
    """Even in the moment in which the files were looked at."""
    coarse_clock(monkeypatch)
    fingerprint = prepare.fingerprint_sources

    def change_after(readings: Any) -> str:
        found = fingerprint(readings)
        in_place(texts / FILE, "another")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "fingerprint_sources", change_after)
        folder = prepare_store(corpus(texts), cache)
    changed = prepare_store(corpus(texts), cache)
    assert changed != folder
    found = {
        name: bytes(store.document(index).astype("u1")).decode()
        for split in ("train", "validation", "test")
        for store in [TokenStore(changed, split)]
        for index, name in enumerate(store.names)
    }
    assert found[FILE].startswith("another")


def test_files_that_were_only_touched_are_read_once(
    corpus, texts, cache, later, monkeypatch
) -> None:
    folder = prepare_store(corpus(texts), cache)
    for file in texts.iterdir():
        os.utime(file, (1, 1))
    assert prepare_store(corpus(texts), cache) == folder
    refuse_to_read(monkeypatch)
    assert prepare_store(corpus(texts), cache) == folder


def test_other_code_reads_again(corpus, texts, cache, later, monkeypatch) -> None:
    prepare_store(corpus(texts), cache)
    monkeypatch.setattr(known_stores, "_rules", lambda: "others")
    refuse_to_read(monkeypatch)
    with pytest.raises(AssertionError, match="is read"):
        prepare_store(corpus(texts), cache)


@pytest.mark.parametrize(
    "options",
    [{"tokenizer": "bpe"}, {"min_characters": 60}, {"validation_fraction": 0.3}],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_read_again(corpus, texts, cache, later, options: dict) -> None:
    folder = prepare_store(corpus(texts), cache)
    assert prepare_store(corpus(texts, **options), cache) != folder
    assert prepare_store(corpus(texts), cache) == folder


def test_a_store_that_is_gone_is_made_again(corpus, texts, cache, later) -> None:
    folder = prepare_store(corpus(texts), cache)
    shutil.rmtree(folder)
    assert prepare_store(corpus(texts), cache) == folder
    assert len(TokenStore(folder, "train")) > 0


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"stamps": 1, "contents": 2}', "{"])
def test_a_damaged_note_is_written_again(corpus, texts, cache, later, monkeypatch, text) -> None:
    folder = prepare_store(corpus(texts), cache)
    (note,) = cache.glob("*.files")
    whole = note.read_text()
    note.write_text(text)
    assert prepare_store(corpus(texts), cache) == folder
    assert note.read_text() == whole


def test_a_note_that_cannot_be_written_does_no_harm(corpus, texts, cache, later) -> None:
    folder = prepare_store(corpus(texts), cache)
    (note,) = cache.glob("*.files")
    note.unlink()
    note.mkdir()
    for _ in range(2):
        assert prepare_store(corpus(texts), cache) == folder


def test_notes_in_a_corpus_are_no_text(corpus, texts, later) -> None:
    """A cache that a run with another cache takes for a folder of the corpus."""
    prepare_store(corpus(texts), texts / "cache")
    (texts / "cache" / "CACHEDIR.TAG").unlink(missing_ok=True)
    files = source_files(corpus(texts).sources)
    assert files is not None
    assert not [file for file in files if str(file).endswith(".files")]


def test_only_local_files_are_looked_at(corpus, texts) -> None:
    assert source_files(corpus("hub:owner/name").sources) is None
    assert source_files(corpus(texts, test_source="hub:owner/name").sources) is None
    assert source_files(corpus(texts).sources) == sorted(map(str, texts.iterdir()))
    library = source_files(corpus("stdlib").sources)
    assert library is not None
    assert len(library) > 100


def test_a_file_that_cannot_be_read_is_not_trusted(tmp_path: Path) -> None:
    known = KnownStore(tmp_path, [], [tmp_path / "missing"])
    assert known.find() is None
    known.note(tmp_path / "no store")
    assert known.find() is None
