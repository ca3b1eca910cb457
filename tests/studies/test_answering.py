"""Text is passed on up to a stop text, wherever the pieces were cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from served import save_model

pytest.importorskip("litserve")

from memorizing_studies.serving.answering import Answer, Until, answer
from memorizing_studies.serving.conversations import Conversations
from memorizing_transformers.commands.reading import open_reader


@pytest.mark.parametrize("seed", range(200))
def test_every_cut_gives_the_text_before_the_first_stop(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("abñ🎉", k=30))
    stops = [
        "".join(draw.choices("abñ🎉", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))
    ]
    until, shown, start = Until(stops), "", 0
    while start < len(text) and not until.found:
        stop = start + draw.randint(0, 5)
        shown += until.push(text[start:stop])
        start = stop
        # What was shown never has to be taken back.
        assert not any(other in shown for other in stops)
    if not until.found:
        shown += until.end()
    places = [text.find(other) for other in stops if other in text]
    if not places:
        assert shown == text
        return
    assert until.found
    assert not any(other in shown for other in stops)
    assert text.startswith(shown)
    assert min(places) == len(shown)


def test_a_penalty_holds_for_turns_that_were_read_before(tmp_path: Path) -> None:
    reader = open_reader(str(save_model(tmp_path)), 32, None, "cpu")
    conversations = Conversations(reader, [], 4, 1e9)
    options: dict[str, Any] = {"temperature": 0, "seed": 0, "stop": [], "sources": False}

    def ask(name: str, ids: list[int], penalty: float) -> list[int]:
        one = conversations.find(name)
        chosen = {**options, "repetition_penalty": penalty}
        list(answer(conversations, one, ids, 40, chosen, Answer()))
        return one.read[len(ids) :]

    first = reader.ids("abcd efgh")[0].tolist()
    answers = []
    for penalty in (1.0, 3.0):
        talk, anew = conversations.open(), conversations.open()
        whole = [*first, *ask(talk, first, penalty), *reader.ids(" and")[0].tolist()]
        assert len(conversations.find(talk).begin(whole)[1]) < len(whole)
        found = ask(talk, whole, penalty)
        assert found == ask(anew, whole, penalty)
        answers.append(found)
    assert answers[0] != answers[1]


def test_requests_of_their_own_close_idle_conversations_too(tmp_path: Path) -> None:
    reader = open_reader(str(save_model(tmp_path)), 32, None, "cpu")
    conversations = Conversations(reader, [], 1, 0.0)
    conversations.open()
    conversations.find(None)
    # Kept open beyond this, it could be asked for again.
    conversations.idle = 1e9
    conversations.open()
