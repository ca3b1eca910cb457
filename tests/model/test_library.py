"""A library gives what a memory of the same documents gives, and grows without being made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import random_tokens, small_model
from torch import Tensor

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation import library as rooms
from memorizing_transformers.generation.library import Library, adding, is_library
from memorizing_transformers.generation.remembered import join
from memorizing_transformers.generation.session import Session
from memorizing_transformers.generation.sources import Sources
from memorizing_transformers.memory import Memory, MemoryView
from memorizing_transformers.memory.search.recall import measured_recall
from memorizing_transformers.model.matching import match_lengths

N, SIZE = 8, 512
DOCUMENTS = [random_tokens(1, length, seed) for seed, length in enumerate((70, 5, 133))]
PROMPT = random_tokens(1, 2 * N + 3, 9)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "joint": {"combine": "joint"},
    "evidence": {"combine": "evidence", "xl_cache": N},
    "int8": {"dtype": "int8"},
    "normalised": {"qk_norm": False},
    "temperature": {"temperature": True, "combine": "joint"},
}


def model_of(name: str = "plain", **settings: Any) -> Any:
    # All pairs are retrieved, so both ways must give the same.
    return small_model(**{"size": SIZE, "top_k": SIZE, **SETTINGS[name], **settings}).eval()


def add(folder: Path, model: Any, documents: list[Tensor], capacity: int = 600) -> Library:
    for number, ids in enumerate(documents):
        if is_library(folder):
            library = Library(folder, model, "bytes")
        else:
            library = Library.create(folder, model, "bytes", N, capacity)
        session = Session(model, 1, library.catalogue.segment_length)
        assert sum(library.add(session, ids, f"d{number}")) == ids.shape[1]
    return library


def asked(library: Library) -> tuple[Session, Tensor]:
    """A session that reads a prompt with the library, and its logits."""
    session = Session(library.model, 1, N)
    library.attach(session)
    return session, torch.cat([out.logits for _, out in session.parts(PROMPT)], 1)


def joined(model: Any, documents: list[Tensor]) -> Tensor:
    sessions = []
    for ids in documents:
        sessions.append(Session(model, 1, N))
        sessions[-1].read(ids)
    whole, _ = join(sessions, [""] * len(sessions), SIZE)
    return torch.cat([out.logits for _, out in whole.parts(PROMPT)], 1)


BIASES: list[dict[str, Any]] = [
    {"position_bias": "t5", "bias_buckets": 8},
    {"position_bias": "log"},
    {"position_bias": "learned-absolute", "bias_buckets": 8},
    {"match_length": 6},
    {"match_length": 6, "position_bias": "log", "combine": "evidence"},
]


@pytest.mark.parametrize("settings", BIASES, ids=str)
def test_biases_of_a_document_do_not_depend_on_those_that_are_added(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(**settings)
    # The added one ends in what comes before the matches, so it would make them longer.
    documents = [torch.cat([DOCUMENTS[0], PROMPT[:, :11]], 1), DOCUMENTS[2][:, :50]]
    ends = [random_tokens(1, 60, 5), torch.cat([DOCUMENTS[1], DOCUMENTS[0][:, -9:]], 1)]
    found = []
    for number, end in enumerate([[], ends[:1], ends[1:], ends]):
        library = add(tmp_path / str(number), model, [*documents, *end], 400 + 100 * number)
        session = Session(model, 1, N)
        library.attach(session)
        bank, reader = session.bank, model.layers[-1].attention.reader
        shelf = MemoryView(bank.memories[1].library, [0])
        slots = torch.arange(sum(ids.shape[1] for ids in documents)).expand(1, 4, N, -1)
        for part in PROMPT[:, : 2 * N].split(N, 1):
            bias, lengths = reader.biases(part, shelf, slots, bank.memories[1])
            found.append((bias, bias if lengths is None else lengths))
            session.read(part)
    if model.config.memory.match_length:
        assert int(found[1][1].max()) == 6
    for number, (bias, lengths) in enumerate(found):
        assert torch.equal(bias, found[number % 2][0])
        assert torch.equal(lengths, found[number % 2][1])


def test_the_reader_tells_a_library_from_the_rows_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(match_length=6)
    library = add(tmp_path / "library", model, DOCUMENTS)
    session = Session(model, 1, N)
    library.attach(session)
    own = session.bank.memories[1]
    reader, asked = model.layers[-1].attention.reader, []
    plain = reader.biases

    def biases(ids: Tensor, memory: Any, slots: Tensor, read: Any = None) -> Any:
        asked.append((memory.base is own.library, read is None or read.base is own))
        assert (read is None) == (memory.base is own.base)
        return plain(ids, memory, slots, read)

    monkeypatch.setattr(reader, "biases", biases)
    session.read(PROMPT)
    assert {*asked} == {(False, True), (True, True)}


@pytest.mark.parametrize("shift", [0, 1])
def test_matches_in_a_library_are_with_what_the_row_has_read(shift: int) -> None:
    generator, longest, size = torch.Generator().manual_seed(0), 5, 40

    def filled(count: int, room: int) -> tuple[Memory, list[int]]:
        memory = Memory(1, 1, room, 2)
        ids = torch.randint(0, 2, (1, count), generator=generator)
        for part in ids.split(4, 1) if count else ():
            pairs = torch.zeros(1, 1, part.shape[1], 2)
            memory.write(pairs, pairs, None, part)
        return memory, ids[0].tolist()

    seen = set()
    for read in (0, 3, 30):
        own, before = filled(read, 12)
        shelf, stored = filled(size, size)
        ids = torch.randint(0, 2, (1, 6), generator=generator)
        slots = torch.arange(size).expand(1, 1, 4, size)  # the last 4 of an open segment
        rows = MemoryView(shelf, [0])
        lengths = match_lengths(ids, rows, slots, longest, shift, own)
        text = before[-12:] + ids[0].tolist()
        for token in range(4):
            now = len(text) - 4 + token
            for slot in range(size):
                length, then = 0, slot - shift
                while length < longest and min(now, then) >= length:
                    if text[now - length] != stored[then - length]:
                        break
                    length += 1
                assert lengths[0, 0, token, slot] == length
                seen.add(length)
    assert seen == {*range(longest + 1)}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_library_answers_as_the_memory_of_all_documents(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    library = add(tmp_path / "library", model, DOCUMENTS)
    _, logits = asked(library)
    torch.testing.assert_close(logits, joined(model, DOCUMENTS), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, joined(model, DOCUMENTS[:2]), atol=1e-3)
    # It is the same when it is opened again, and nothing was written to it.
    again = asked(Library(tmp_path / "library", model, "bytes"))[1]
    assert torch.equal(again, logits)


def test_a_session_that_is_taken_keeps_the_library(tmp_path: Path) -> None:
    library = add(tmp_path / "library", model_of(), DOCUMENTS)
    _, logits = asked(library)
    session = Session(library.model, 1, N)
    library.attach(session)
    for taken in (session.take([0]), session.take([0, 0])):
        rows = taken.bank.batch_size
        parts = [out.logits for _, out in taken.parts(PROMPT.expand(rows, -1))]
        torch.testing.assert_close(torch.cat(parts, 1), logits.expand(rows, -1, -1))


def asked_without(library: Library, name: str) -> None:
    """Attach to a library that lacks a file, and put the file back."""
    path = library.folder / name
    path.rename(library.folder / "away")
    try:
        library.attach(Session(library.model, 1, N))
    finally:
        (library.folder / "away").rename(path)


@pytest.mark.parametrize("name", ["plain", "int8"])
def test_an_index_grows_and_finds_what_a_scan_finds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    model = model_of(name, top_k=6)
    documents = [random_tokens(1, 400, seed) for seed in range(6)]
    monkeypatch.setattr(rooms, "INDEX_EVERY", 700)
    library = add(tmp_path / "indexed", model, documents, 3000)
    # Two documents at once, so three generations, and only the last one is there.
    assert library.catalogue.indexed == 2400
    names = {path.name for path in (tmp_path / "indexed").glob("*.faiss")}
    assert names == {f"1.{head}.2400.faiss" for head in range(2)}
    library = add(tmp_path / "indexed", model, [random_tokens(1, 50, 77)])
    assert (library.catalogue.indexed, library.catalogue.count["1"]) == (2400, 2450)
    assert "damaged" in refusal(lambda: asked_without(library, "1.0.2400.faiss"))
    session = Session(model, 1, N)
    library.attach(session)
    memory = session.bank.memories[1].library
    assert memory.search.index.count == 2400
    queries = torch.randn(1, 2, 300, 4, generator=torch.Generator().manual_seed(0))
    assert measured_recall(memory.search, queries, memory, top_k=6, sample=300) > 0.9
    # The newest pairs are not in the index and are found all the same.
    newest = memory.keys_at((slice(None), slice(None), slice(2400, 2450)))
    for head in range(2):
        slots = memory.search(50 * newest, memory, 6).slots[0, head]
        scores = (newest[0, head, :, None] * memory.keys_at((0, head, slots))).sum(-1)
        own = newest[0, head].square().sum(-1)
        assert bool((scores.amax(1) >= own - 1e-4).all())


def test_sources_name_the_document_and_the_place(tmp_path: Path) -> None:
    library = add(tmp_path / "library", model_of(top_k=3), DOCUMENTS)
    session = Session(library.model, 1, N)
    library.attach(session)

    class Names:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    observer = session.observer = Sources(library.passages, Names())
    session.read(PROMPT)
    texts = [" ".join(map(str, ids[0].tolist())) for ids in DOCUMENTS]
    found = [source for origin in observer.origins for source in origin.sources]
    assert {source.document for source in found} >= {"d0", "d2", ""}
    for source in found:
        if source.document:
            number = int(source.document[1:])
            assert source.text in texts[number]
            token = DOCUMENTS[number][0, source.position]
            assert str(int(token)) in source.text.split()


def refusal(call: Any) -> str:
    with pytest.raises(ConfigError) as found:
        call()
    assert "\n" not in str(found.value)
    return str(found.value)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder, model = tmp_path / "library", model_of()
    library = add(folder, model, DOCUMENTS, 300)
    other = model_of("joint")
    assert "another model" in refusal(lambda: Library(folder, other, "bytes"))
    assert "another tokenizer" in refusal(lambda: Library(folder, model, "words"))
    assert "--capacity" in refusal(lambda: add(folder, model, [random_tokens(1, 93)]))
    assert Library(folder, model, "bytes").catalogue == library.catalogue
    small = Session(model, 1, N, model.new_memory(1, size=N - 1))
    assert "segment length" in refusal(lambda: [*library.add(small, PROMPT, "x")])
    none = Session(model, 1, N, model.new_memory(1, size=0))
    assert "at least 1 slot" in refusal(lambda: [*library.add(none, PROMPT, "x")])
    assert "other things" in refusal(lambda: Library.create(tmp_path, model, "bytes", N, 300))
    with adding(folder):
        # The lock of one process is not its own obstacle, so ask as another would.
        from filelock import FileLock, Timeout

        with pytest.raises(Timeout):
            FileLock(tmp_path / ".library.lock", timeout=0).acquire()
    with (folder / "1.keys.bin").open("ab") as file:
        file.write(b"more")
    assert "another size" in refusal(lambda: asked(Library(folder, model, "bytes")))
    for text in ("", "{", "[]", json.dumps({"model": 1})):
        (folder / "library.json").write_text(text)
        assert "damaged" in refusal(lambda: Library(folder, model, "bytes"))


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = add(tmp_path / "library", model_of(), DOCUMENTS[:1])
    free = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    assert "on the disk" in refusal(lambda: add(tmp_path / "library", library.model, [PROMPT]))


def test_a_document_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    folder, model = tmp_path / "library", model_of()
    library = add(folder, model, DOCUMENTS[:1])
    _, logits = asked(library)
    reading = library.add(Session(model, 1, N), random_tokens(1, 200, 5), "lost")
    for _ in range(9):
        next(reading)
    del reading
    again = Library(folder, model, "bytes")
    assert torch.equal(asked(again)[1], logits)
    again = add(folder, model, DOCUMENTS[1:])
    wanted = joined(model, DOCUMENTS)
    torch.testing.assert_close(asked(again)[1], wanted, atol=1e-5, rtol=1e-4)
