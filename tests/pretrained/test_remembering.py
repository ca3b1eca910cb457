"""What a pretrained model remembers of a document, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from memorizing_transformers import MemorizedModel, memorize
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.causal_lm import SessionCache, causal_lm
from memorizing_transformers.generation.library import Library
from memorizing_transformers.generation.remembered import join, load, save
from memorizing_transformers.generation.session import Session

N = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "memory": {"layers": [1]},
    "xl": {"layers": [0, 1], "xl_cache": 8},
    "start": {"layers": [1], "xl_cache": 4, "position": "start", "skip_first": 0},
}


def text(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def model_of(name: str, **memory: Any) -> MemorizedModel:
    settings = {"size": 20, "top_k": 4, **memory}
    return memorize(tiny("llama"), settings, **SETTINGS[name]).eval()


def answer(session: Session) -> Tensor:
    return torch.stack([session.read(token) for token in text(3 * N, 9).split(1, 1)])


@pytest.mark.parametrize("length", [2, 4 * N, 4 * N + 2], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_remembered_answers_as_reading_anew(
    name: str, length: int, tmp_path: Path
) -> None:
    model = model_of(name)
    reader, anew = Session(model, 1, N), Session(model, 1, N)
    for session in (reader, anew):
        session.read(text(length))
    save(reader, tmp_path / "a.memory", "a", "words")
    loaded, _ = load(tmp_path / "a.memory", model, "words")
    assert torch.equal(answer(loaded), answer(anew))


def test_places_of_joined_documents_follow_each_other(tmp_path: Path) -> None:
    model = model_of("xl", size=60)
    documents = {"a": text(27, 1), "b": text(14, 2)}
    for name, ids in documents.items():
        reader = Session(model, 1, N)
        reader.read(ids)
        save(reader, tmp_path / name, name, "words")
    sessions = [load(tmp_path / name, model, "words")[0] for name in documents]
    joined, found = join(sessions, [*documents], 60)
    memory = joined.bank.memories[1]
    assert int(memory.read[0]) == sum(passage.count for passage in found)
    slots = memory.valid()[0].nonzero().flatten()
    for slot in slots.tolist():
        place = int(memory.positions[0, slot])
        (passage,) = [p for p in found if p.first <= place < p.first + p.count]
        token = documents[passage.name][0, passage.place(place)]
        assert int(memory.token_ids[0, slot]) == int(token)
    assert {p.name for p in found} == {"a", "b"}


def test_a_saved_model_opens_what_the_one_that_was_saved_remembered(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = memorize(base, {"size": 20, "top_k": 4}, layers=[1]).eval()
    reader = Session(model, 1, N)
    reader.read(text(20))
    save(reader, tmp_path / "a.memory", "a", "words")
    model.save_pretrained(tmp_path / "saved")
    again = MemorizedModel.from_pretrained(tmp_path / "saved")
    loaded, _ = load(tmp_path / "a.memory", again, "words")
    assert torch.equal(answer(loaded), answer(load(tmp_path / "a.memory", model, "words")[0]))
    with torch.no_grad():
        again.base.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="another model"):
        load(tmp_path / "a.memory", again, "words")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_family_generates_as_its_own_model_while_nothing_is_remembered(family: str) -> None:
    """Within one segment a memory says nothing, so the answers are those of transformers."""
    base = tiny(family)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    for beams in (1, 3):
        expected = base.generate(ids, num_beams=beams, **options)
        model = memorize(tiny(family), {"size": 20, "top_k": 4}, layers=[1], xl_cache=8)
        found = causal_lm(model, 32).generate(ids, num_beams=beams, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_that_share_a_memory_answer_as_if_alone(beams: int) -> None:
    model = model_of("xl")
    read = Session(model, 1, N)
    read.read(text(20))
    prompts = torch.randint(VOCABULARY, (6, 4), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    lm = causal_lm(model, N)
    lm.generation_config.eos_token_id = None

    def ask(ids: Tensor) -> Tensor:
        cache = SessionCache([read.take([0])])
        found: Tensor = lm.generate(ids, past_key_values=cache, **options)
        return found

    together = ask(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], ask(prompt[None]))


@pytest.mark.parametrize("position", ["distance", "start"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_oss", "gemma2"])
def test_a_library_is_as_a_memory_of_text_that_is_far_away(
    family: str, position: str, tmp_path: Path
) -> None:
    settings = {"size": 80, "top_k": 80, "search": "exact"}
    model = memorize(tiny(family), settings, layers=[1], position=position).eval()
    documents = [text(27, 1), text(14, 2)]
    library = Library.create(tmp_path / "library", model, "words", N, 200)
    sessions = []
    for number, ids in enumerate(documents):
        list(library.add(Session(model, 1, N), ids, str(number)))
        sessions.append(Session(model, 1, N))
        sessions[-1].read(ids)
    joined, _ = join(sessions, ["0", "1"], 80)
    for memory in joined.bank.memories.values():
        memory.read += 10**6  # tokens between the documents and the prompt
    reader = Session(model, 1, N)
    library.attach(reader)
    for token_by_token in (False, True):
        one, other = reader.take([0]), joined.take([0])
        if token_by_token:
            found, wanted = answer(one), answer(other)
        else:
            ids = text(3 * N, 9)
            found, wanted = (
                torch.cat([output.logits for _, output in session.parts(ids)], 1)
                for session in (one, other)
            )
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(answer(Session(model, 1, N)), answer(reader.take([0])), atol=1e-3)
