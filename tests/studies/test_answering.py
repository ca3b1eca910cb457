"""Text is passed on up to a stop text, wherever the pieces were cut."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("litserve")

from memorizing_studies.serving.answering import Until


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
