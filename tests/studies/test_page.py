"""The page carries its own data, lets no document break it, and stays within its size."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from examples import report_on, small_model
from hostile import HOSTILE

from memorizing_studies.inspection.page import facts, render
from memorizing_studies.inspection.plots import INK, draw
from memorizing_studies.inspection.report import Report

NAME = "</script><img src=x onerror=alert(1)>{{data}}.txt"

DRAWN = ("path", "g", "use", "text", "defs", "clippath", "rect", "tspan")
"""Tags of figures, which depend on the numbers."""


class Outline(HTMLParser):
    """The tags of a page with their attributes, the contents of its scripts, its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def hostile() -> Report:
    return report_on(HOSTILE * 3, small_model(), document=NAME, checkpoint=NAME)


@pytest.fixture(scope="module")
def page(hostile: Report) -> str:
    return render(hostile)


def test_a_hostile_document_leaves_the_outline_as_it_is(hostile: Report, page: str) -> None:
    harmless = report_on("a" * len(HOSTILE.encode()) * 3, small_model())
    outlines = []
    for content in (page, render(harmless)):
        tags = [tag for tag, _ in Outline(content).tags]
        outlines.append([tag for tag in tags if tag not in DRAWN])
    assert outlines[0] == outlines[1]
    for part in ("hacked", "alert", "onerror", "\u202e", "\0", "\u2028", "😀"):
        assert part not in page


def test_data_is_nothing_but_base64(page: str) -> None:
    *data, _script = Outline(page).scripts
    assert len(data) >= 8
    assert all(re.fullmatch(r"[A-Za-z0-9+/]+=*", block) for block in data)
    kinds = [given.get("type") for tag, given in Outline(page).tags if tag == "script"]
    assert kinds == ["application/octet-stream"] * len(data) + [None]


def test_nothing_is_fetched_and_only_our_script_runs(page: str) -> None:
    outline = Outline(page)
    for tag, given in outline.tags:
        for name in ("src", "href", "action", "xlink:href"):
            assert (given.get(name) or "#").startswith(("#", "data:")), tag
        assert not [name for name in given if name.startswith("on")]
    policy = next(given["content"] for tag, given in outline.tags if "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    digest = hashlib.sha256(outline.scripts[-1].encode()).digest()
    assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    assert not re.search(r"@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_every_place_of_the_template_is_filled(page: str) -> None:
    assert "{{" not in Outline(page).text
    assert page.count("<svg") == 5


def test_the_same_report_gives_the_same_page(hostile: Report, page: str) -> None:
    assert render(hostile) == page


def test_a_page_stays_within_its_size() -> None:
    report = report_on(HOSTILE * 3, small_model(layers=[0, 1]), retrieved=4, segment=64)
    whole = render(report)
    smaller = render(report, len(whole) - 12_000)
    assert len(smaller) <= len(whole) - 12_000


@pytest.mark.parametrize(
    ("combine", "sizes"),
    [
        ("gate", (32,)),
        ("gate", (32, 4096)),
        ("fixed", (32,)),
        ("content", (4096,)),
        ("joint", (32,)),
    ],
)
def test_figures_take_the_pages_colours(combine: str, sizes: tuple[int, ...]) -> None:
    model = small_model(combine=combine, layers=[0, 1])
    figures = draw(report_on(HOSTILE * 2, model, sizes))
    for svg in figures.values():
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert INK not in svg
        assert "<style" not in svg
        assert "font-family" not in svg
    assert "layer 1 head 3" in figures["gates"]
    assert "layer 0" in figures["mass"]


def test_the_summary_is_that_of_the_losses(hostile: Report) -> None:
    told = facts(hostile)
    off, on = told["readings"]
    assert (off["name"], on["name"], told["length"]) == ("off", "32", len(hostile.tokens))
    bits = hostile.traces[1].bits[1:]
    assert on["perplexity"] == pytest.approx(2 ** bits.mean(), rel=1e-5)
    # A document of bytes has a token a byte.
    assert on["bits_per_byte"] == pytest.approx(bits.mean(), rel=1e-5)
    assert told["names"].keys() <= {str(token) for token in range(256)}
    assert len(told["headUse"]) == 4
