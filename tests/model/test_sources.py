"""What is shown as the source of a token is in that document, at that place."""

from __future__ import annotations

import torch
from build import VOCAB, small_model

from memorizing_transformers.generation.remembered import Passage
from memorizing_transformers.generation.session import Session
from memorizing_transformers.generation.sources import AROUND, Sources


class Numbers:
    """Shows ids as numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_source_shows_the_document_around_its_position() -> None:
    model = small_model(size=100, copy=["repeats"], xl_cache=5).eval()
    one, two = torch.randint(VOCAB, (2, 1, 40), generator=torch.Generator().manual_seed(1))
    session = Session(model, 1, 8)
    session.read(torch.cat([one, two], 1))
    passages = [Passage("one", 0, 0, 40), Passage("two", 40, 0, 40)]
    session.observer = watch = Sources(passages, Numbers())
    session.read(torch.cat([two[:, 10:17], one[:, 5:12]], 1))
    texts = {"one": one[0].tolist(), "two": two[0].tolist()}
    found = [s for origin in watch.origins for s in [*origin.sources, origin.repeated] if s]
    known = [source for source in found if source.document]
    assert len(watch.origins) == 14
    assert {source.document for source in known} == {"one", "two"}
    for source in known:
        text = texts[source.document]
        first = max(0, source.position - AROUND)
        assert source.text == Numbers().decode(text[first : source.position + AROUND + 1])
    repeated = [origin.repeated for origin in watch.origins]
    # After the second repeated token a suffix of two is known: the next token is its source.
    assert repeated[3] is not None
    assert (repeated[3].document, repeated[3].position) == ("two", 14)
