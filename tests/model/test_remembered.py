"""What was remembered of a document answers as reading it anew, bit for bit, or is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from build import VOCAB, small_model
from safetensors import safe_open
from safetensors.torch import save_file
from test_open_segment import SETTINGS, N, text

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.remembered import HEADER, join, load, passages, save
from memorizing_transformers.generation.session import Session

SIZED = {**SETTINGS, "large": {"size": 100, "xl_cache": 5}}


def answer(session: Session, count: int = 3 * N + 1) -> torch.Tensor:
    """Logits of a text that follows, token by token."""
    ids = torch.randint(VOCAB, (1, count), generator=torch.Generator().manual_seed(9))
    return torch.stack([session.read(token) for token in ids.split(1, 1)])


@pytest.mark.parametrize("length", [2, 4 * N, 4 * N + 2], ids=str)
@pytest.mark.parametrize("name", SIZED)
def test_what_was_remembered_answers_as_reading_anew(
    name: str, length: int, tmp_path: Path
) -> None:
    model, document = small_model(**SIZED[name]).eval(), text(1, length)
    reader = Session(model, 1, N)
    reader.read(document)
    save(reader, tmp_path / "a.memory", "a", "words")
    # Whoever saved can read on, and the file is complete or absent.
    assert [path.name for path in tmp_path.iterdir()] == ["a.memory"]
    loaded, title = load(tmp_path / "a.memory", model, "words")
    assert (title, loaded.count) == ("a", length)
    anew = Session(model, 1, N)
    anew.read(document)
    expected = answer(anew)
    assert torch.equal(answer(loaded), expected)
    assert torch.equal(answer(reader), expected)


def test_rows_that_were_taken_are_remembered_too(tmp_path: Path) -> None:
    model, documents = small_model(size=30, xl_cache=5).eval(), text(2, 40)
    reader = Session(model, 2, N)
    reader.read(documents)
    save(reader.take([1]), tmp_path / "a.memory", "a", "words")
    anew = Session(model, 1, N)
    anew.read(documents[1:])
    loaded, _ = load(tmp_path / "a.memory", model, "words")
    assert torch.allclose(answer(loaded), answer(anew), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="one row"):
        save(reader, tmp_path / "b.memory", "b", "words")


def test_a_file_holds_filled_slots_alone(tmp_path: Path) -> None:
    model = small_model(size=10_000).eval()
    reader = Session(model, 1, N)
    reader.read(text(1, 3 * N + 1))
    save(reader, tmp_path / "a.memory", "a", "words")
    assert (tmp_path / "a.memory").stat().st_size < 20_000
    loaded, _ = load(tmp_path / "a.memory", model, "words")
    assert loaded.bank.memories[1].size == 10_000


def remembered(folder: Path, **settings: object) -> Path:
    reader = Session(small_model(**{"size": 30, "xl_cache": 5, **settings}).eval(), 1, N)
    reader.read(text(1, 40))
    save(reader, folder / "a.memory", "a", "words")
    return folder / "a.memory"


def test_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    path = remembered(tmp_path)
    model = small_model(size=30, xl_cache=5).eval()
    load(path, model, "words")
    with pytest.raises(ConfigError, match="another tokenizer"):
        load(path, model, "other words")
    changed = small_model(size=30, xl_cache=5).eval()
    with torch.no_grad():
        changed.norm.weight += 0.01
    others = [small_model(size=30, layers=[0]), small_model(size=30, qk_norm=False), changed]
    for other in others:
        with pytest.raises(ConfigError, match=r"^memory = .*another model"):
            load(path, other.eval(), "words")
    # Sizes and searches are those of the run, not of the weights.
    load(path, small_model(size=50, top_k=2, xl_cache=8).eval(), "words")


def test_no_damaged_file_is_accepted(tmp_path: Path) -> None:
    path = remembered(tmp_path)
    model = small_model(size=30, xl_cache=5).eval()
    raw, draw = path.read_bytes(), random.Random(0)
    for turn in range(200):
        if turn % 4 == 0:
            damaged = raw[: draw.randrange(len(raw))]
        elif turn % 4 == 1:
            damaged = raw + draw.randbytes(draw.randrange(1, 50))
        else:
            place = draw.randrange(len(raw))
            bits = bytes([raw[place] ^ (1 << draw.randrange(8))])
            damaged = raw[:place] + bits + raw[place + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"^memory = ") as caught:
            load(path, model, "words")
        assert "\n" not in str(caught.value)
    with safe_open(remembered(tmp_path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in [*file.keys()]}
        header = json.loads(file.metadata()[HEADER])
    for changed in ({**header, "tokens": 41}, {"digest": header["digest"]}):
        save_file(tensors, path, {HEADER: json.dumps(changed)})
        with pytest.raises(ConfigError, match=r"^memory = "):
            load(path, model, "words")
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"^memory = "):
        load(path, model, "words")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    reader = Session(small_model().eval(), 1, N)
    reader.read(text(1, 10))
    with pytest.raises(ConfigError, match=r"^out = "):
        save(reader, tmp_path / "taken", "a", "words")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}, {"size": 12}], ids=str)
def test_memories_of_documents_are_searched_together(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """The first memory layer computes nothing from other memories, so it must hold their pairs."""
    chosen = {"size": 60, "layers": [0], "xl_cache": 5, "top_k": 8, **settings}
    model = small_model(**chosen).eval()
    documents = {"a": text(1, 27), "b": text(1, 31).flip(1), "c": text(1, 13) % 7}
    single = {}
    for name, ids in documents.items():
        reader = Session(model, 1, N)
        reader.read(ids)
        save(reader, tmp_path / name, name, "words")
        single[name], _ = load(tmp_path / name, model, "words")
    sessions = [load(tmp_path / name, model, "words", to_join=True)[0] for name in documents]
    for session, ids in zip(sessions, documents.values(), strict=True):
        assert session.bank.memories[0].size <= ids.shape[1] + N
    joined, found = join(sessions, [*documents], 60)
    memory = joined.bank.memories[0]
    position = 0
    for passage, (name, ids) in zip(found, documents.items(), strict=True):
        assert (passage.name, passage.first) == (name, position)
        held = ids[0, passage.begin :]
        assert passage.count == len(held)
        slots = slice(position, position + passage.count)
        assert torch.equal(memory.token_ids[0, slots].long(), held)
        assert memory.positions[0, slots].tolist() == [*range(position, slots.stop)]
        assert passage.place(position) == ids.shape[1] - len(held)
        alone = single[name]
        alone.close()
        own = alone.bank.memories[0]
        order = (own.written[0] - passage.count + torch.arange(passage.count)) % own.size
        for get in ("keys", "values"):
            assert torch.equal(getattr(memory, get)[:, :, slots], getattr(own, get)[:, :, order])
        position += passage.count
    assert int(memory.fill[0]) == position
    output = next(output for _, output in joined.parts(text(1, 4)))
    slots = output.retrievals[0].slots[output.retrievals[0].valid]
    owners = {next(p.name for p in found if p.first <= s < p.first + p.count) for s in slots}
    assert len(owners) > 1


def test_one_memory_alone_is_as_it_was(tmp_path: Path) -> None:
    path = remembered(tmp_path)
    model = small_model(size=30, xl_cache=5).eval()
    expected = answer(load(path, model, "words")[0])
    session, found = join([load(path, model, "words")[0]], ["a"], 60)
    assert found == passages(load(path, model, "words")[0], "a")
    assert torch.equal(answer(session), expected)


@pytest.mark.parametrize("size", [0, 5, 12, 99])
def test_the_slots_that_were_asked_for_hold_the_newest_pairs(tmp_path: Path, size: int) -> None:
    """Nothing that is kept depends on what the last layer reads, so reading anew is the same."""
    model = small_model(size=30, xl_cache=5).eval()
    anew = Session(model, 1, N, model.new_memory(1, size=size))
    reader = Session(model, 1, N)
    for session in (reader, anew):
        session.read(text(1, 5 * N + 2))
    save(reader, tmp_path / "a", "a", "words")
    loaded, _ = load(tmp_path / "a", model, "words", size=size)
    assert [m.size for m in loaded.bank.memories.values()] == [size] * bool(size)
    if size <= 30:
        assert torch.equal(answer(loaded), answer(anew))
    # Of several files too, the last ones of which are the newest.
    sessions = [load(tmp_path / "a", model, "words", True, size)[0] for _ in "ab"]
    joined, _ = join(sessions, ["a", "b"], 30, size)
    held = [int(m.fill[0]) for m in joined.bank.memories.values()]
    assert held == [min(size, 10 * N + 4)] * bool(size)
    if size in (5, 12):
        own = sessions[1].bank.memories[1]
        assert {*joined.bank.memories[1].token_ids[0].tolist()} <= {*own.token_ids[0].tolist()}
    joined.read(text(1, 3))
